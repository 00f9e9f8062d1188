"""The decoder: its layers, its mixture of experts, its key-value cache."""
