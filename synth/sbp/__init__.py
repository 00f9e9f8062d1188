"""Synthetic bootstrapped pretraining (arXiv 2509.15248): a model learns how documents of its corpus relate, and writes more."""
