"""Attention for packed rows: one public function, several implementations, one definition."""
