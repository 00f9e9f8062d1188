"""Fictional worlds: facts whose every consequence is known, rendered as documents and asked about."""
