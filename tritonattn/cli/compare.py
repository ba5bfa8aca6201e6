"""`tritonattn compare`: `demo`, layer by layer."""

from __future__ import annotations

import argparse
from pathlib import Path

from .demo import run
from .language_model import add_modes, add_opening
from .options import names

__all__ = ["DESCRIPTION", "HELP", "add_arguments", "run"]

HELP = "compare scalings on some or all layers of a model, layer by layer"
DESCRIPTION = (
    "Patch the attention layers of a pretrained language model with each scaling in turn, run a text through it, and "
    "print its loss and perplexity, and for every layer the entropy of its attention and its logits; draw them too. "
    "sqrt_dim, the model as it is, always runs first. Needs no GPU."
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_opening(parser)
    add_modes(parser, "sqrt_dim,key_norm_mean,log_key_count")
    layers = "patch these only: layer numbers (-1 is the last), module names or patterns (default: all)"
    parser.add_argument("--layers", type=_layers, metavar="A,B", help=layers)
    picture = {"default": Path("compare.png"), "help": "the picture (default: %(default)s)"}
    parser.add_argument("--plot", type=Path, metavar="FILE", **picture)
    parser.set_defaults(by_layer=True)


def _layers(text: str) -> tuple[int | str, ...]:
    return tuple(int(name) if name.removeprefix("-").isdecimal() else name for name in names(text))
