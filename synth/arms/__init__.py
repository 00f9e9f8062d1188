"""Arms: the same base and the same steps on different texts, and what each knows with the book closed."""
