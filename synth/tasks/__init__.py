"""Questions asked of a model: with the book closed, with the book open, and about its summaries."""
