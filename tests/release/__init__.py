"""Checks of a release, which its workflow runs too: `agreement`, `installed`."""
