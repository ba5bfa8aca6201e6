"""Every kernel compiles for every target without a GPU: one table of cases, the longest of them in tests/slow."""
