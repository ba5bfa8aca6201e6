"""Types, checks and groups of the options that several commands have."""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import torch

from ..core.errors import CommandError, install


class Command(NamedTuple):
    """A subcommand: its texts, its options, and its work, which imports what only this command needs."""

    help: str
    description: str
    add_arguments: Callable[[argparse.ArgumentParser], object]
    run: Callable[[argparse.Namespace], int]


def require(command: str, modules: list[str], extra: str) -> None:
    """Raise CommandError naming the missing modules and the pip command that installs them."""
    missing = [module for module in modules if find_spec(module) is None]
    if missing:
        raise CommandError(f"{command} needs {', '.join(missing)}; to mend it: {install(extra)}")


def names(text: str) -> tuple[str, ...]:
    """Parse a comma-separated list."""
    return tuple(name.strip() for name in text.split(",") if name.strip())


def number(least: int, most: int | None = None) -> Callable[[str], int]:
    """Make the type of an option that takes a whole number from `least` up."""
    expected = f"a whole number from {least} {'up' if most is None else f'to {most}'}"

    def parse(text: str) -> int:
        digits = text.strip()
        if not digits.isdecimal() or int(digits) < least or (most is not None and int(digits) > most):
            raise argparse.ArgumentTypeError(f"expected {expected}, got {text!r}")
        return int(digits)

    return parse


def numbers(least: int, most: int | None = None) -> Callable[[str], tuple[int, ...]]:
    """Make the type of a comma-separated list of whole numbers, each kept once, in its order."""
    return lambda text: tuple(dict.fromkeys(map(number(least, most), text.split(","))))


whole_number, whole_numbers = number(1), numbers(1)


def chosen(known: Sequence[Any]) -> Callable[[str], tuple[Any, ...]]:
    """Make the type of a comma-separated list of known values; their order is kept."""

    def parse(text: str) -> tuple[Any, ...]:
        found = names(text)
        for name in found or ("nothing",):
            if name not in map(str, known):
                raise argparse.ArgumentTypeError(f"expected {', '.join(map(str, known))}, got {name!r}")
        return tuple(value for value in known if str(value) in found)

    return parse


def add_number(parser: argparse.ArgumentParser, option: str, least: int, text: str) -> None:
    """Add an option that takes a number from `least` up."""
    parser.add_argument(option, type=number(least), metavar="N", help=text)


def add_chosen(parser: argparse.ArgumentParser, option: str, known: Sequence[Any], text: str) -> None:
    """Add an option that takes some of the known values, separated by commas; the default is all of them."""
    parser.add_argument(option, type=chosen(known), default=tuple(known), metavar="A,B", help=text)


def add_device(parser: argparse.ArgumentParser, text: str) -> None:
    """Add --device; `text` says what runs there."""
    parser.add_argument("--device", type=device, default="cpu", help=f"{text}, e.g. cuda (default: %(default)s)")


def device(text: str) -> torch.device:
    """Parse --device, and refuse a device that this machine lacks."""
    try:
        found = torch.device(text)
        torch.empty(0, device=found)
    except (RuntimeError, AssertionError) as error:
        raise argparse.ArgumentTypeError(f"cannot use {text!r}: {str(error).splitlines()[0]}") from error
    return found


def check_file(option: str, file: Path | None) -> None:
    """Make the folder of a file before the work whose result goes into it. Raises CommandError."""
    if file is None:
        return
    make_folder(option, file.parent)
    if file.is_dir() or not os.access(file if file.exists() else file.parent, os.W_OK):
        raise CommandError(f"{option}: expected a file that can be written, got {str(file)!r}")


def make_folder(option: str, folder: Path) -> None:
    """Make a folder where there is none. Raises CommandError where that fails."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise CommandError(f"{option}: expected a folder, got {str(folder)!r}: {error.strerror}") from error
