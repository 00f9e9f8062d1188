"""Documents in, synthetic documents out: every text knows its parents, every step can be resumed."""
