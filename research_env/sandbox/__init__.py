"""The jail: a ladder of isolation levels, one mechanism a file, and the launcher that watches a job."""
