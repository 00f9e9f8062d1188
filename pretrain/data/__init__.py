"""Documents to packed rows on disk, and rows to global batches."""
