"""Bit equality of a sequence's results alone and in company, with `batch_invariant`: random cases on any backend."""
