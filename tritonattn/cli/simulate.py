"""`tritonattn simulate`."""

from __future__ import annotations

import argparse
from pathlib import Path

from ..core.errors import CommandError
from ..lab.simulation.distributions import DISTRIBUTIONS
from ..scaling import SCALINGS
from .options import add_chosen, check_file, device, make_folder, numbers, require
from .threads import limit_threads

HELP = "measure the softmax and its gradients on random queries and keys, with each scaling"
DESCRIPTION = (
    "Simulate random queries and keys. paper: Bernhard's simulations (arXiv:2311.09406). sweep: what the softmax looks "
    "like and which gradient reaches q and k, in every mode, by number, dimension and kind of keys. verdict: whether "
    "one temperature serves rows whose keys vary in number or norm. Needs no GPU."
)
PARTS = ("paper", "sweep", "verdict")
_COUNTS, _DIMS = (2, 8, 32, 128, 1024, 8192, 65536), (64, 16, 32, 128, 256, 512)
_QUICK_COUNTS, _QUICK_DIMS = (2, 32, 1024), (64, 16, 256)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add_chosen(parser, "--parts", PARTS, f"parts to run (default: {','.join(PARTS)})")
    add_chosen(parser, "--modes", tuple(SCALINGS), "scalings to measure (default: all)")
    add("--counts", type=numbers("--counts", 2, 1 << 20), metavar="A,B", help="numbers of keys (default: 2 to 65536)")
    dims = "head dims; kinds of keys are measured at the first (default: 64, 16 to 512)"
    add("--dims", type=numbers("--dims", 1, 1 << 12), metavar="A,B", help=dims)
    add_chosen(parser, "--keys", tuple(DISTRIBUTIONS), "kinds of keys (default: all; see docs/simulation.md)")
    add("--seed", type=int, default=0, metavar="N", help="seed of the random operands (default: %(default)s)")
    add("--device", type=device, default="cpu", help="where to compute, e.g. cuda (default: %(default)s)")
    add("--quick", action="store_true", help="fewer numbers, dimensions and sequences: half a minute")
    add("--json", type=Path, metavar="FILE", help="also write every figure as JSON")
    add("--plot", type=Path, metavar="DIR", help="also draw the pictures, into this folder")


def run(options: argparse.Namespace) -> int:
    require("simulate", ["tqdm"] + ["matplotlib"] * (options.plot is not None), extra="lab")
    from ..lab.simulation import command

    if not 0 <= options.seed < 1 << 63:
        raise CommandError(f"--seed: expected an integer from 0 to 2^63 - 1, got {options.seed}")
    check_file("--json", options.json)
    if options.plot is not None:
        make_folder("--plot", options.plot)
    limit_threads()
    options.counts = options.counts or (_QUICK_COUNTS if options.quick else _COUNTS)
    options.dims = options.dims or (_QUICK_DIMS if options.quick else _DIMS)
    return command.run(options)
