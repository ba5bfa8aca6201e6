"""Scalings on random queries and keys: `tritonattn simulate`."""
