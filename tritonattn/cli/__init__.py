"""The command line: `tritonattn <command>`."""

from .main import main

__all__ = ["main"]
