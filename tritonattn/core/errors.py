"""The errors of commands."""

from __future__ import annotations

from pathlib import Path

INTERRUPTED = 130  # exit status after Ctrl-C, as shells have it: 128 + SIGINT


class CommandError(Exception):
    """A message for the person at the command line: printed without a traceback, with exit status 2."""


def install(extra: str) -> str:
    """The pip command that brings an extra: in a checkout of the checkout, which may be on no package index.

    An installed package of that name satisfies the other command, which then asks an index for the extra alone.
    """
    checkout = Path(__file__).resolve().parents[2]
    if (checkout / "pyproject.toml").is_file():
        return f'pip install -e "{checkout}[{extra}]"'
    return f'pip install "tritonattn[{extra}]"'
