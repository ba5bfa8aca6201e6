"""The error of commands, and their end at Ctrl-C."""

from __future__ import annotations

import os
import signal
import sys
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


def guard_imports() -> None:
    """Let Ctrl-C end a command without a traceback while it imports the package; nothing else is changed.

    Importing torch takes seconds, and runs before any function of a command could catch KeyboardInterrupt.
    """
    name = Path(sys.argv[0]).name if sys.argv else ""
    is_module = name == "-m" and not {"tritonattn", "perf"}.isdisjoint(sys.orig_argv)
    is_command = name in ("tritonattn", "tritonattn.exe") or is_module
    if is_command and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, _end)


def unguard() -> None:
    """Let Ctrl-C raise KeyboardInterrupt again."""
    if signal.getsignal(signal.SIGINT) is _end:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def _end(*_: object) -> None:
    print("interrupted", file=sys.stderr, flush=True)
    os._exit(INTERRUPTED)
