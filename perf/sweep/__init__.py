"""Sweeps: the suites, their runner, and tables and charts of the records."""
