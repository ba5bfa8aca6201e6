"""The error of commands, and an exit status."""

from __future__ import annotations

INTERRUPTED = 130  # exit status after Ctrl-C, as shells have it: 128 + SIGINT


class CommandError(Exception):
    """A message for the person at the command line: printed without a traceback, with exit status 2."""
