"""EntiGraph (arXiv 2409.07431): text about the relations between the entities of a document."""
