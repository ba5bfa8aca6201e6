"""Small GPTs that read on beyond their trained length, by the factor of their attention and by their layers.

Trains the models of `cells.py`, appends each to a record as it ends, and goes on where the record stops.
"""

from __future__ import annotations

import argparse
from dataclasses import replace
from datetime import datetime, timezone
from pathlib import Path

import torch

from tritonattn.cli.options import check_file
from tritonattn.core.errors import CommandError
from tritonattn.core.provenance import Environment

from .cells import study, swaps_of
from .records import RECORD, Run, append, read
from .training import Cell, trained

TEST_TOKENS = {"ledger": 16_384, "code": 65_536}


def quick(cell: Cell) -> Cell:
    """The same model after a few steps, for a test of the command: its results mean nothing."""
    return replace(cell, recipe=replace(cell.recipe, cap=2, cool=2, batch=2))


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--only", default="", metavar="WORDS", help="cells whose names have all these words")
    parser.add_argument("--list", action="store_true", help="print the cells' names, + before those on record")
    parser.add_argument("--quick", action="store_true", help="four steps a model: its results mean nothing")
    parser.add_argument("--out", type=Path, default=RECORD, help="the record; default: %(default)s")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> None:
    check_file("--out", options.out)
    words = set(options.only.split())
    cells = [cell for cell in study() if words <= set(cell.name.split())]
    if not cells:
        raise CommandError(f"--only: expected words of a name that --list prints, got {options.only!r}")
    if options.quick:
        if options.out == RECORD:
            raise CommandError("--quick: expected --out FILE beside it, so that the study's record stays as it is")
        cells = [quick(cell) for cell in cells]
    done = {one.cell for one in read(options.out)}
    if options.list:
        print("\n".join(f"{'+' if cell in done else ' '} {cell.name}" for cell in cells))
        return
    torch.set_num_threads(1)
    environment = Environment.of(torch.device("cpu"), "python -m perf language-model", peers=("tokenizers",))
    for number, cell in enumerate(cells, 1):
        if cell in done:
            continue
        found = trained(cell, test_tokens=2048 if options.quick else TEST_TOKENS[cell.task], swaps=swaps_of(cell))
        today = datetime.now(timezone.utc).date().isoformat()
        append(options.out, Run(cell, found, environment, today))
        longest = list(found.results[""].values())[-1]
        print(
            f"{number}/{len(cells)} {cell.name}: {found.steps} steps, {found.cpu_seconds:.0f} CPU s, "
            f"loss {longest['loss']:.3f} and accuracy {longest['accuracy']:.3f} at the longest",
            flush=True,
        )
