"""Scaling: a ladder of small runs, the law they follow, and what it predicts for a larger one."""
