"""The methods EntiGraph is compared with, each at matched tokens and behind the same protocol."""
