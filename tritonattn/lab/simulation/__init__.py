"""What each scaling makes of random queries and keys: `tritonattn simulate`."""
