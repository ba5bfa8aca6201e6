"""Options that several commands have, and the command line of a measurement, rebuilt from its options."""

from __future__ import annotations

import argparse
from pathlib import Path

# They change no figure, so that a run with other ones goes on.
_OF_NO_FIGURE = ("run", "json", "minutes")


def command_line(command: str, options: argparse.Namespace) -> str:
    """Rebuild the command that measures the same: all options that are set, without files and time limits."""
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


def add_folder(parser: argparse.ArgumentParser, default: str) -> None:
    """Add --out, the folder of a command's files."""
    text = "the folder to write into (default: %(default)s)"
    parser.add_argument("--out", type=Path, default=Path(default), metavar="DIR", help=text)
