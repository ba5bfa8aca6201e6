"""`tritonattn length-study`."""

from __future__ import annotations

import argparse

from .language_model import NEEDED, WRITTEN_MODE, add_model
from .options import add_folder, add_number, make_folder, names, require

HELP = "loss by position of a pretrained model, beyond its trained context, with each scaling"
DESCRIPTION = (
    "Run a long text through a pretrained language model, patched with each scaling, and show its loss by position, "
    "below and above the number of positions that it was trained on. The same command goes on where it was stopped. "
    "Needs no GPU."
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_model(parser, "all of Alice in Wonderland")
    modes = (
        f"{WRITTEN_MODE} (default: sqrt_dim, sqrt_dim*1.08, qwen_logn:CONTEXT, qwen_logn:2048, "
        "log_key_count:CONTEXT, llama4, key_norm_mean)"
    )
    parser.add_argument("--modes", type=names, metavar="A,B", help=modes)
    tokens = "use the first N tokens of the text (default: one and a half times the trained context)"
    add_number(parser, "--max-tokens", 2, tokens)
    positions = "average the loss over N positions in tables and plots (default: a 24th of the tokens)"
    add_number(parser, "--bin", 2, positions)
    parser.add_argument("--quick", action="store_true", help="use 384 tokens, to see that it works")
    add_folder(parser, "length-study")


def run(options: argparse.Namespace) -> int:
    require("length-study", [*NEEDED, "matplotlib"], extra="demo")
    from ..lab import length
    from ..lab.modes import check_written

    options.modes = options.modes or length.VARIANTS
    check_written(options.modes)
    make_folder("--out", options.out)
    return length.run(options)
