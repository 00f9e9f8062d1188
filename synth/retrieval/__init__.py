"""From a question to passages: cut, search, rerank. Works offline by default."""
