"""Language models behind one protocol: hosted, local, scripted; cached, budgeted, retried."""
