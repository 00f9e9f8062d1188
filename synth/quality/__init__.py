"""What a corpus looks like in numbers, and what must not be in it."""
