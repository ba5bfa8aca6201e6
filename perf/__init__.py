"""Benchmarks: `python -m perf`."""

import tritonattn as tritonattn  # guards the imports of `python -m perf` against Ctrl-C, while its name is still -m
