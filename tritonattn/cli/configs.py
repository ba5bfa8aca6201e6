"""`tritonattn configs`."""

from __future__ import annotations

import argparse

from .options import require

HELP = "print the tile configs in use, and where each comes from"
DESCRIPTION = (
    "Print the tile config of every kernel, head dim, set of scales and length, and the table that it comes from."
)
GPUS = "a100, a10, l40s, h100, h200, b200, rtx_pro_6000, rtx_5090, mi300x, mi350x"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--gpu", metavar="NAME", help=f"the GPU: {GPUS}, or sm_90, ... (default: this machine's)")


def run(options: argparse.Namespace) -> int:
    require("configs", ["triton"], extra="perf")
    from ..tuner.in_use import configs

    return configs(options.gpu)
