"""`tritonattn configs`."""

from __future__ import annotations

import argparse

from .options import require

HELP = "print the tile configs in use, and where each comes from"
DESCRIPTION = None


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--gpu", help="h100, a100, ... (default: this machine's)")


def run(options: argparse.Namespace) -> int:
    require("configs", ["triton", "tabulate"], extra="perf")
    from ..tuner.in_use import configs

    return configs(options.gpu)
