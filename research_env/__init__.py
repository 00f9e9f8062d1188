"""An environment where a code diff earns a number, and where research learns from it."""
