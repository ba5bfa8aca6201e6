"""Model how full a card is under calls of few programs, and when they end, unsplit and in splits.

List scheduling, as in `schedule.py`, of the tiles of the shipped tables' configs. A program takes its keys' time, or
its rows', and a fixed one; a split also that of its part (`tritonattn.tuning.splits`). The kernel that joins the parts
is left out, and so is memory.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from tabulate import tabulate

from tritonattn.cli.options import whole_numbers
from tritonattn.core.provenance import commit
from tritonattn.core.records import FIGURES
from tritonattn.tuning import splits
from tritonattn.tuning.config import Problem, Target, TileConfig
from tritonattn.tuning.gpus import GPUS
from tritonattn.tuning.lookup import config_for

from .schedule import end_on

HEADING = """# Calls of few programs, unsplit and in splits

Modelled by list scheduling at commit {commit} (`python -m perf fill`); nothing ran. bf16, batch 1, 32 query heads, the
configs of the shipped tables. A cell has programs, the share of the slots for programs that are taken until the last
one ends, and that end over the unsplit one's.
"""
CARDS = ("h100", "b200", "a100", "mi300x")
_HEADS = 32


@dataclass(frozen=True)
class Fill:
    """Programs; the share of the card's slots that are taken until the last ends; that end, in keys or rows."""

    programs: int
    share: float
    end: float


def target_of(card: str) -> Target:
    gpu = next(gpu for gpu in GPUS if gpu.name == card)
    return gpu.target._replace(card=card, processors=gpu.processors)


def config_of(kernel: str, head_dim: int, target: Target) -> TileConfig:
    problem = Problem(head_dim, head_dim, torch.bfloat16, right=True, grouped=kernel == "grad_key_value")
    return config_for(kernel, problem, target)


def of_keys(rows: int, keys: int, count: int, config: TileConfig, target: Target) -> Fill:
    """A causal forward of rows at the end of the keys."""
    ends = range(rows, 0, -config.block_m)  # of the blocks that start last, first
    tiles = [keys - rows + end for end in reversed([min(rows, rows - end + config.block_m) for end in ends])]
    return _filled(tiles, _HEADS, count, config.block_n, 1, config, target)


def of_rows(length: int, kv_heads: int, causal: bool, count: int, config: TileConfig, target: Target) -> Fill:
    """The gradients of keys and values of as many rows as keys."""
    tiles = [length - causal * start for start in range(0, length, config.block_n)]
    return _filled(tiles, kv_heads, count, config.block_m, _HEADS // kv_heads, config, target)


def _filled(
    tiles: list[int], heads: int, count: int, step: int, times: int, config: TileConfig, target: Target
) -> Fill:
    """Programs in the order in which they start: all heads of a tile's splits, tile after tile."""
    taken = []
    for tile in tiles:
        blocks = times * -(-tile // step)
        size = -(-blocks // count)
        for split in range(count):
            steps = min(max(blocks - split * size, 0), size) * step
            taken += [splits.FIXED + splits.PRICE * (count > 1) + steps] * heads
    dies, machines = target.architecture.dies, splits.resident(config, target)
    end = max(end_on(machines // dies, taken[die::dies]) for die in range(dies))
    return Fill(len(taken), sum(taken) / (machines * end), end)


def rows_of_table(options: argparse.Namespace) -> list[list[str]]:
    found = []
    for card in CARDS:
        target = target_of(card)
        for head_dim in options.head_dims:
            config = config_of("forward", head_dim, target)
            for rows in options.rows:
                cells = [_cell(*forward(rows, keys, config, target)) for keys in options.keys]
                found.append([card, str(head_dim), f"{rows} rows", *cells])
            config = config_of("grad_key_value", head_dim, target)
            for kv_heads, causal in ((1, False), (1, True), (4, True)):
                name = f"dK, dV of 2,048 keys, key heads: {kv_heads}" + ", causal" * causal
                found.append([card, str(head_dim), name, _cell(*gradients(2048, kv_heads, causal, config, target))])
    return found


def forward(rows: int, keys: int, config: TileConfig, target: Target) -> tuple[Fill, Fill]:
    """Unsplit, and with the splits that such a call has."""
    count = splits.splits_of_keys(rows, keys, config, target)
    return of_keys(rows, keys, 1, config, target), of_keys(rows, keys, count, config, target)


def gradients(length: int, kv_heads: int, causal: bool, config: TileConfig, target: Target) -> tuple[Fill, Fill]:
    """Gradients of keys and values, likewise."""
    count = splits.splits_of_rows(length, length, causal, _HEADS // kv_heads, kv_heads, config, target)
    one, several = (of_rows(length, kv_heads, causal, n, config, target) for n in (1, count))
    return one, several


def _cell(before: Fill, after: Fill) -> str:
    programs = f"{before.programs} -> {after.programs}"
    return f"{programs}, {before.share:.2f} -> {after.share:.2f}, {after.end / before.end:.2f}"


def report(found: Sequence[list[str]], keys: Sequence[int]) -> str:
    columns = ["card", "head dim", "call", *(f"{count:,} keys" for count in keys)]
    cells = [[*row, *[""] * (len(columns) - len(row))] for row in found]
    return f"{HEADING.format(commit=commit())}\n{tabulate(cells, columns, 'github', **FIGURES)}\n"


def run(options: argparse.Namespace) -> None:
    print(report(rows_of_table(options), options.keys))


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--head-dims", type=whole_numbers, default=(64, 128), help="64,128,...")
    parser.add_argument("--rows", type=whole_numbers, default=(17, 128, 256, 512, 768, 1024), help="of queries")
    parser.add_argument("--keys", type=whole_numbers, default=(8192, 32768, 131072), help="with those of the rows")
    parser.set_defaults(run=run)
