"""Model when the tiles of a causal forward end on a card's processors, in several orders of programs.

List scheduling: programs start in the order of their grid, each where one ends first. A program takes a fixed time and
one step for each block of keys that is visible to its rows; memory, and the caches that the order is also chosen for,
are left out. AMD's dies take programs in turn, and each has its processors.
"""

from __future__ import annotations

import argparse
import heapq
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import product

from tabulate import tabulate

from tritonattn.cli.options import whole_numbers
from tritonattn.core.provenance import commit
from tritonattn.core.records import FIGURES
from tritonattn.tuning.config import Target
from tritonattn.tuning.gpus import GPUS
from tritonattn.tuning.order import Sections, sections

HEADING = """# Order of programs: a causal forward, head after head and in sections of heads

Modelled by list scheduling at commit {commit} (`python -m perf schedule`); nothing ran. Tiles of {block_m} query
rows and {block_n} keys in bf16, {fixed} steps for what a program does outside of its loop.

A cell has the time until the last tile ends, over that of longest first among all heads: head after head, the last
block of rows first / in sections of heads that fit the L2 cache, longest first (tritonattn/tuning/order.py)."""

# Programs that a processor holds at once, in the shipped configs of head dims 64 and 128.
_RESIDENT = {"h100": 1, "b200": 1, "a100": 2, "mi300x": 1}
_BLOCK_M, _BLOCK_N = 128, 64
FIXED = 3  # of the time of one step: a tile's first loads, and its end (FlashAttention-3: 3,200 clocks, 1,000 a step)

Tile = tuple[int, int]  # head, block of rows


@dataclass(frozen=True)
class Case:
    """heads: of all batch entries; each has other keys and values."""

    gpu: str
    head_dim: int
    length: int
    heads: int

    @property
    def blocks(self) -> int:
        return -(-self.length // _BLOCK_M)

    @property
    def target(self) -> Target:
        return next(gpu.target for gpu in GPUS if gpu.name == self.gpu)

    @property
    def sections(self) -> Sections:
        return sections(self.heads, self.length * 2 * self.head_dim * 2, self.target)


def by_head(case: Case) -> Iterator[Tile]:
    """Order tiles head after head, the last block of each first."""
    return ((head, block) for head in range(case.heads) for block in reversed(range(case.blocks)))


def in_sections(case: Case) -> Iterator[Tile | None]:
    """Order tiles as the kernels do, None for a program without a head."""
    for program in programs(case.heads, case.blocks, case.sections, case.target.architecture.dies):
        yield program and (program[0], case.blocks - 1 - program[1])


def programs(heads: int, blocks: int, sections: Sections, dies: int) -> Iterator[Tile | None]:
    """(head, number of the block among its head's) of programs: `backends.triton.block.program_in_section`."""
    size, count = sections
    for first in range(heads - size * count, heads, size):
        of_die, shared = divmod(min(first + size, size), dies)
        for step, position in product(range(blocks), range(size)):
            slot, die = divmod(position, dies)
            turn = (die + step * shared) % dies
            head = max(first, 0) + (die * of_die + slot if slot < of_die else dies * of_die + turn)
            has_head = slot < of_die or (slot == of_die and turn < shared)
            yield (head, step) if has_head else None


def longest_first(case: Case) -> Iterator[Tile]:
    return ((head, block) for block in reversed(range(case.blocks)) for head in range(case.heads))


def end_of(case: Case, order: Iterable[Tile | None]) -> float:
    """Steps until the last tile has ended."""
    gpu, dies = next(gpu for gpu in GPUS if gpu.name == case.gpu), case.target.architecture.dies
    tiles = list(order)
    machines = gpu.processors // dies * _RESIDENT[case.gpu]
    of_dies = ([_steps(case, tile[1]) for tile in tiles[die::dies] if tile] for die in range(dies))
    return max(end_on(machines, steps) for steps in of_dies)


def _steps(case: Case, block: int) -> int:
    return FIXED + -(-min((block + 1) * _BLOCK_M, case.length) // _BLOCK_N)


def end_on(machines: int, times: Iterable[int]) -> int:
    """Return when the last of tiles ends that take these times, each started where one ends first."""
    free = [0] * machines
    for time in times:
        heapq.heapreplace(free, free[0] + time)
    return max(free)


@dataclass(frozen=True)
class Row:
    """Times over that of longest first."""

    gpu: str
    head_dim: int
    length: int
    heads: int
    by_head: float
    in_sections: float


def row(case: Case) -> Row:
    best = end_of(case, longest_first(case))
    now, new = (round(end_of(case, order(case)) / best, 3) for order in (by_head, in_sections))
    return Row(case.gpu, case.head_dim, case.length, case.heads, now, new)


def rows(options: argparse.Namespace) -> list[Row]:
    shapes = product(options.head_dims, options.lengths, options.heads)
    return [row(Case(gpu, *shape)) for gpu, shape in product(_RESIDENT, shapes)]


def report(found: Sequence[Row]) -> str:
    heads = sorted({one.heads for one in found})
    lines: dict[tuple[str, int, int], dict[int, str]] = {}
    for one in found:
        cells = lines.setdefault((one.gpu, one.head_dim, one.length), {})
        cells[one.heads] = f"{one.by_head:.2f} / {one.in_sections:.2f}"
    columns = ["card", "head dim", "length", *(f"{count} heads" for count in heads)]
    heading = HEADING.format(commit=commit(), block_m=_BLOCK_M, block_n=_BLOCK_N, fixed=FIXED)
    body = [[*key, *cells.values()] for key, cells in lines.items()]
    return f"{heading}\n\n{tabulate(body, columns, 'github', **FIGURES)}\n"


def run(options: argparse.Namespace) -> None:
    print(report(rows(options)))


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--head-dims", type=whole_numbers, default=(64, 128), help="64,128,...")
    parser.add_argument("--lengths", type=whole_numbers, default=(1024, 2048, 4096, 8192, 16384), help="tokens")
    parser.add_argument("--heads", type=whole_numbers, default=(8, 16, 20, 32, 37, 64, 128, 192), help="of all batches")
    parser.set_defaults(run=run)
