"""`tritonattn demo`."""

from __future__ import annotations

import argparse
from pathlib import Path

from .language_model import NEEDED, add_modes, add_opening
from .options import check_file, names, require
from .threads import limit_threads

HELP = "patch a small model that then recalls among 64 times its keys; run a text through a real one"
DESCRIPTION = (
    "With the default modes, first train a small model for seconds, with QK-norm and without, patch it, and print how "
    "much it recalls among more keys than it was trained on, before and after. Then run a text through a pretrained "
    "language model once with each scaling of the attention logits, and print what that does to its loss and its "
    "attention. Needs no GPU."
)
MODES = "sqrt_dim,key_norm_mean,sqrt_key_count,key_count,key_norm_sum,log_key_count,none"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_opening(parser)
    add_modes(parser, MODES)
    parser.add_argument("--plot", type=Path, metavar="FILE", help="also draw the figures (.png, .svg, .pdf)")
    parser.set_defaults(layers=None, by_layer=False)


def run(options: argparse.Namespace) -> int:
    require(options.command, NEEDED + ["matplotlib"] * (options.plot is not None), extra="demo")
    from ..lab import demo

    demo.check(options)
    check_file("--json", options.json)
    check_file("--plot", options.plot)
    limit_threads()
    return demo.run(options, swap=not options.by_layer and options.modes == names(MODES))
