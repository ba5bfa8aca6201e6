"""Commands that train, simulate and watch: demo, simulate, watch."""

from __future__ import annotations

from argparse import ArgumentParser, Namespace
from pathlib import Path

from ..core.errors import CommandError
from ..lab.simulation.distributions import DISTRIBUTIONS
from ..scaling import SCALINGS
from .options import (
    Command,
    add_chosen,
    add_device,
    check_file,
    make_folder,
    numbers,
    require,
)
from .threads import limit_threads

_PARTS = ("paper", "sweep", "verdict")
_COUNTS, _DIMS = (2, 8, 32, 128, 1024, 8192, 65536), (64, 16, 32, 128, 256, 512)
_QUICK_COUNTS, _QUICK_DIMS = (2, 32, 1024), (64, 16, 256)


def _add_demo(parser: ArgumentParser) -> None:
    add_device(parser, "where models train")


def _demo(options: Namespace) -> int:
    from ..lab import demo

    limit_threads()
    return demo.run(options.device)


def _add_simulate(parser: ArgumentParser) -> None:
    add = parser.add_argument
    add_chosen(parser, "--parts", _PARTS, f"parts to run (default: {','.join(_PARTS)})")
    add_chosen(parser, "--modes", tuple(SCALINGS), "scalings to measure (default: all)")
    add("--counts", type=numbers(2, 1 << 20), metavar="A,B", help="numbers of keys (default: 2 to 65536)")
    dims = "head dims; distributions of keys are measured at the first (default: 64, 16 to 512)"
    add("--dims", type=numbers(1, 1 << 12), metavar="A,B", help=dims)
    add_chosen(parser, "--keys", tuple(DISTRIBUTIONS), "distributions of keys (default: all; see docs/simulation.md)")
    add("--seed", type=int, default=0, metavar="N", help="seed of the random operands (default: %(default)s)")
    add_device(parser, "where to compute")
    add("--quick", action="store_true", help="fewer numbers, dimensions and sequences: half a minute")
    add("--json", type=Path, metavar="FILE", help="also write every figure as JSON")
    add("--plot", type=Path, metavar="DIR", help="also draw the pictures, into this folder")


def _simulate(options: Namespace) -> int:
    require("simulate", ["tqdm"] + ["matplotlib"] * (options.plot is not None), extra="perf")
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


def _add_watch(parser: ArgumentParser) -> None:
    files = "the JSON lines that a Monitor wrote; several files are compared"
    parser.add_argument("files", type=Path, nargs="+", metavar="FILE", help=files)
    output = "page (.html) or picture (.png) to write (default: the name of FILE with .html; of several, watch.html)"
    parser.add_argument("--output", type=Path, metavar="FILE", help=output)


def _watch(options: Namespace) -> int:
    from ..lab import watch

    alone = len(options.files) == 1
    options.output = options.output or (options.files[0].with_suffix(".html") if alone else Path("watch.html"))
    if options.output.suffix not in watch.SUFFIXES or options.output in options.files:
        expected = f"a name that ends in {' or '.join(watch.SUFFIXES)}, other than FILE"
        raise CommandError(f"--output: expected {expected}, got {str(options.output)!r}")
    require("watch", ["matplotlib"], extra="monitor")
    check_file("--output", options.output)
    return watch.run(options)


COMMANDS = {
    "demo": Command(
        "train small GPTs on 64 tokens that then read 2,048, with a factor that grows with n and without: a minute",
        "Train three small GPTs to look up records in 64 tokens: with 1/sqrt(D), with a factor that grows with the "
        "number of keys, and with one that is learned. Print the share of values that each recalls in 2,048 tokens, "
        "and that of the first one with such a factor put in after training. Takes about a minute on one core. Needs "
        "no GPU and no extra.",
        _add_demo,
        _demo,
    ),
    "simulate": Command(
        "measure the softmax and its gradients on random queries and keys, with each scaling",
        "Simulate random queries and keys. paper: Bernhard's simulations (arXiv:2311.09406). sweep: what the softmax "
        "looks like and which gradient reaches q and k, in every mode, by number, dimension and distribution of keys. "
        "verdict: whether one temperature serves rows whose keys vary in number or norm. Needs no GPU.",
        _add_simulate,
        _simulate,
    ),
    "watch": Command(
        "draw what a Monitor wrote: each layer's attention while it trained, or several runs next to one another",
        "Draw the JSON lines that `tritonattn.analysis.Monitor(model, file=...)` wrote: the loss, and for each layer "
        "its largest logit, entropy, shares of one-hot and uniform rows, gradients and output over the steps, with "
        "alarms. Each of several files is a line: its layers' largest logit, and the mean over its layers of all else. "
        "The output is a page for a browser, in one file, or a picture. A run that still goes on may be drawn.",
        _add_watch,
        _watch,
    ),
}
