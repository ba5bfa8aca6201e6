"""The options of commands: their types, their checks, and those that several commands have.

A type that raises CommandError names its option; `main` prints the message.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from ..core.errors import CommandError, install


def require(command: str, modules: list[str], extra: str) -> None:
    """Raise CommandError naming the missing modules and the pip command that installs them."""
    missing = [module for module in modules if find_spec(module) is None]
    if missing:
        raise CommandError(f"{command} needs {', '.join(missing)}; to mend it: {install(extra)}")


def names(text: str) -> tuple[str, ...]:
    """Parse a comma-separated list."""
    return tuple(name.strip() for name in text.split(",") if name.strip())


def whole_number(text: str) -> int:
    """Parse a number from 1 up."""
    if not text.strip().isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected a whole number from 1 up, got {text!r}")
    return int(text)


def whole_numbers(text: str) -> tuple[int, ...]:
    """Parse a comma-separated list of numbers from 1 up."""
    return tuple(map(whole_number, text.split(",")))


def at_least(option: str, least: int) -> Callable[[str], int]:
    """Make the type of an option that takes a number from `least` up."""

    def parse(text: str) -> int:
        try:
            number = int(text)
        except ValueError as error:
            raise argparse.ArgumentTypeError(f"expected a whole number, got {text!r}") from error
        if number < least:
            raise CommandError(f"{option}: expected at least {least}, got {number}")
        return number

    return parse


def add_number(parser: argparse.ArgumentParser, option: str, least: int, text: str) -> None:
    """Add an option that takes a number from `least` up."""
    parser.add_argument(option, type=at_least(option, least), metavar="N", help=text)


def numbers(option: str, least: int, most: int) -> Callable[[str], tuple[int, ...]]:
    """Make the type of a comma-separated list of integers, each kept once, in its order."""

    def parse(text: str) -> tuple[int, ...]:
        found = names(text)
        for name in found or ("nothing",):
            if not name.isdecimal() or not least <= int(name) <= most:
                raise CommandError(f"{option}: expected integers from {least} to {most}, got {name!r}")
        return tuple(dict.fromkeys(map(int, found)))

    return parse


def chosen(option: str, known: Sequence[Any]) -> Callable[[str], tuple[Any, ...]]:
    """Make the type of a comma-separated list of known values; their order is kept."""

    def parse(text: str) -> tuple[Any, ...]:
        found = names(text)
        for name in found or ("nothing",):
            if name not in map(str, known):
                raise CommandError(f"{option}: expected {', '.join(map(str, known))}, got {name!r}")
        return tuple(value for value in known if str(value) in found)

    return parse


def add_chosen(parser: argparse.ArgumentParser, option: str, known: Sequence[Any], text: str) -> None:
    """Add an option that takes some of the known values, separated by commas; the default is all of them."""
    parser.add_argument(option, type=chosen(option, known), default=tuple(known), metavar="A,B", help=text)


def device(text: str) -> torch.device:
    """Parse --device. Raises CommandError for a device that this machine lacks."""
    try:
        found = torch.device(text)
        torch.empty(0, device=found)
    except (RuntimeError, AssertionError) as error:
        raise CommandError(f"--device: cannot use {text!r}: {str(error).splitlines()[0]}") from error
    return found


def check_file(option: str, file: Path | None) -> None:
    """Make the folder of a file before the work whose result goes into it. Raises CommandError."""
    if file is None:
        return
    make_folder(option, file.parent)
    if file.is_dir() or not os.access(file if file.exists() else file.parent, os.W_OK):
        raise CommandError(f"{option}: expected a file that can be written, got {str(file)!r}")


def add_folder(parser: argparse.ArgumentParser, default: str) -> None:
    """Add --out, the folder of a command's files."""
    text = "the folder to write into (default: %(default)s)"
    parser.add_argument("--out", type=Path, default=Path(default), metavar="DIR", help=text)


def make_folder(option: str, folder: Path) -> None:
    """Make a folder where there is none. Raises CommandError where that fails."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise CommandError(f"{option}: expected a folder, got {str(folder)!r}: {error.strerror}") from error
