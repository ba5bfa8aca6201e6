"""Deliberate faults in the package, each of which a named test must catch: `make mutants`."""
