"""Methods that choose what to try next: ask, tell, and a replay from the ledger."""
