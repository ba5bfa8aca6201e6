"""The command of a measurement, as its options say it."""

from __future__ import annotations

import argparse

# Files and time limits change no figure; another run with the same command goes on.
_OF_NO_FIGURE = ("run", "json", "minutes")


def command_line(command: str, options: argparse.Namespace) -> str:
    """Write the command that measures the same: every option that is set, but for files and time limits."""
    words = [f"python -m perf {command}"]
    for name, value in vars(options).items():
        if name in _OF_NO_FIGURE or value in (None, False):
            continue
        option = f"--{name.replace('_', '-')}"
        if value is True:
            words.append(option)
        else:
            words.append(f"{option} {','.join(map(str, value)) if isinstance(value, tuple) else value}")
    return " ".join(words)
