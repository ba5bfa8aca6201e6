"""`tritonattn train-compare`."""

from __future__ import annotations

import argparse

from .options import add_folder, add_number, device, make_folder, names, require

HELP = "train small models with each scaling, several seeds each, and compare them"
DESCRIPTION = (
    "Train small transformers with each scaling on small tasks: a byte language model (text), a vision transformer "
    "(digits), numbers to words by cross attention (spell), and, tested with more keys than in training, retrieval "
    "from a table (recall) and of a string's first bit (first). Every mode of a seed starts from the same weights and "
    "gets the same data. Write records, tables and plots into a folder; the same command goes on where it was stopped. "
    "Needs no GPU."
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    tasks = "tasks to train on: text, digits, spell, recall, first (default: all but first)"
    add("--tasks", type=names, default="text,digits,spell,recall", metavar="A,B", help=tasks)
    modes = (
        "modes, learned scalings (ssmax, power_law, ...), modes with a learned gain a head (key_count+gain) or a "
        "constant one (sqrt_dim*4), and two of these, the second for testing only (sqrt_dim:log_key_count); "
        "default: nine of them, or with --grid sqrt_dim,key_norm_sum+gain"
    )
    add("--modes", type=names, metavar="A,B", help=modes)
    add_number(parser, "--seeds", 2, "runs of each mode, at least 2 (default: 5; 2 with --quick or --grid)")
    add_number(parser, "--steps", 1, "steps of every run (default: each task's own)")
    add("--qk-norm", action="store_true", help="models that RMS-normalise q and k, as Qwen 3 and Gemma 3 do")
    add_number(parser, "--head-dim", 1, "the dimension of every head, a divisor of a model's width (default: 16)")
    add("--grid", action="store_true", help="train two modes with several optimizers, learning rates and weight decays")
    add("--quick", action="store_true", help="train everything for a few steps, to see that it works")
    add("--report", action="store_true", help="train nothing; write tables and plots of the runs in the folder")
    add_folder(parser, "train-compare")
    add("--device", type=device, default="cpu", help="where models train, e.g. cuda (default: %(default)s)")


def run(options: argparse.Namespace) -> int:
    require("train-compare", ["sklearn", "scipy", "matplotlib", "tqdm"], extra="lab")
    from ..lab import training

    options.modes = training.checked_modes(options)
    if not options.report:
        make_folder("--out", options.out)
    return training.run(options)
