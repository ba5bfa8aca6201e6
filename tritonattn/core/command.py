"""What the command line's commands share."""

from __future__ import annotations

import argparse
import os
from importlib.util import find_spec
from pathlib import Path

import torch

INTERRUPTED = 130  # exit status after Ctrl-C, as shells have it: 128 + SIGINT


class CommandError(Exception):
    """A message for the person at the command line: shown without a traceback, with exit status 2."""


def require(command: str, modules: list[str], extra: str) -> None:
    """Raise CommandError naming the missing modules and the pip command that brings them."""
    missing = [module for module in modules if find_spec(module) is None]
    if missing:
        raise CommandError(f"{command} needs {', '.join(missing)}; to mend it: pip install 'tritonattn[{extra}]'")


def whole_number(text: str) -> int:
    """The type of an option that takes a number from 1 up."""
    if not text.strip().isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected a whole number from 1 up, got {text!r}")
    return int(text)


def whole_numbers(text: str) -> tuple[int, ...]:
    """The type of an option that takes several, with commas between them."""
    return tuple(map(whole_number, text.split(",")))


def usable_device(name: str) -> torch.device:
    """The device of an option --device; CommandError where it is none of this machine."""
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise CommandError(f"--device: cannot use {name!r}: {str(error).splitlines()[0]}") from error
    return device


def usable_cores() -> int:
    """The cores that this process may run on: a container or a job often has fewer than the machine."""
    if hasattr(os, "sched_getaffinity"):  # Linux
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def check_file(option: str, file: Path | None) -> None:
    """Before the work, make the folder of a file that is written after it; CommandError where it could not be."""
    if file is None:
        return
    made_folder(option, file.parent)
    if file.is_dir() or not os.access(file if file.exists() else file.parent, os.W_OK):
        raise CommandError(f"{option}: wanted a file that can be written, got {str(file)!r}")


def made_folder(option: str, folder: Path) -> None:
    """Make the folder of an option where it is not there; CommandError where that cannot be."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise CommandError(f"{option}: wanted a folder, got {str(folder)!r}: {error.strerror}") from error
