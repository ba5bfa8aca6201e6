"""`tritonattn env`."""

from __future__ import annotations

import argparse

HELP = "print versions, GPU, and the tables in use: for a report"
DESCRIPTION = "Print versions, GPU, driver, compilers and the tables in use: paste it into a bug report."


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add nothing."""


def run(options: argparse.Namespace) -> int:
    from ..tuner.environment import environment

    for name, value in environment().items():
        print(f"{name}: {value}")
    return 0
