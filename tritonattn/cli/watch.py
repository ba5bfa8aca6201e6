"""`tritonattn watch`."""

from __future__ import annotations

import argparse
from pathlib import Path

from ..core.errors import CommandError
from .options import check_file, require

HELP = "draw what a Monitor wrote: each layer's attention while it trained, or several runs beside one another"
DESCRIPTION = (
    "Draw the JSON lines that `tritonattn.analysis.Monitor(model, file=...)` wrote: the loss, and for each layer its "
    "largest logit, entropy, shares of one-hot and uniform rows, gradients and output over the steps, with alarms. "
    "Each of several files is a line: its layers' largest logit, and the mean over its layers of all else. The output "
    "is a page for a browser, in one file, or a picture. A run that still goes on may be drawn."
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    files = "the JSON lines that a Monitor wrote; several files are compared"
    parser.add_argument("files", type=Path, nargs="+", metavar="FILE", help=files)
    output = "page (.html) or picture (.png) to write (default: the name of FILE with .html; of several, watch.html)"
    parser.add_argument("--output", type=Path, metavar="FILE", help=output)


def run(options: argparse.Namespace) -> int:
    from ..lab import watch

    alone = len(options.files) == 1
    options.output = options.output or (options.files[0].with_suffix(".html") if alone else Path("watch.html"))
    if options.output.suffix not in watch.SUFFIXES or options.output in options.files:
        expected = f"a name that ends in {' or '.join(watch.SUFFIXES)}, other than FILE"
        raise CommandError(f"--output: expected {expected}, got {str(options.output)!r}")
    require("watch", ["matplotlib"], extra="monitor")
    check_file("--output", options.output)
    return watch.run(options)
