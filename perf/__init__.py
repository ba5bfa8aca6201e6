"""Benchmarks: `python -m perf`."""
