"""The programs of a launch: the sizes of a call, and from a plan and these the grid, its order and its splits."""

from __future__ import annotations

from typing import NamedTuple

from ...tuning.config import ROW_TERMS_ALIGNMENT, TileConfig
from ...tuning.order import sections
from ...tuning.splits import splits_of_keys, splits_of_rows
from .device import Grid
from .launch import Plan
from .records import Arguments

_MOST_SPLITS = 64  # of decode


class Sizes(NamedTuple):
    """The numbers of a call that make the grids of its launches.

    batch, q_len, k_len     of its tensors
    sequences, rows, keys   of its packed sequences, and of the longest one; else as above
    left, right             of its window, or None
    is_short                it has at most `tuning.config.SHORT` rows and keys
    """

    batch: int
    q_heads: int
    kv_heads: int
    q_len: int
    k_len: int
    sequences: int
    rows: int
    keys: int
    left: int | None
    right: int | None
    invariant: bool
    is_short: bool

    @property
    def group(self) -> int:
        return self.q_heads // self.kv_heads

    def reach(self, config: TileConfig) -> int:
        """Keys that a block of rows attends to, at most, or rows that attend to a block of keys."""
        if self.left is None or self.right is None:
            return self.rows + self.keys
        return self.left + self.right + max(config.block_m, config.block_n)


class Programs(NamedTuple):
    """The grid of a launch, and the arguments that go with it.

    first_head          of `block.program_in_section`
    splits, part_rows   programs that share a block's work, and rows of each one's part; None where there is one
    """

    grid: Grid
    arguments: Arguments


def over_rows(chosen: Plan, sizes: Sizes) -> Programs:
    """For each block of rows, or for each split of its keys."""
    config, splits = chosen.config, 1
    if "splits" in chosen.names and not sizes.invariant:
        splits = splits_of_keys(sizes.rows, min(sizes.keys, sizes.reach(config)), config, chosen.target)
    blocks, heads = -(-sizes.rows // config.block_m), sizes.q_heads * sizes.sequences
    head_bytes = sizes.keys * _row_bytes(chosen) * sizes.kv_heads // sizes.q_heads
    return _in_sections(chosen, blocks, heads, head_bytes, splits, sizes.batch * sizes.q_heads * sizes.q_len)


def over_keys(chosen: Plan, sizes: Sizes) -> Programs:
    """For each block of keys, or for each split of the rows of its group."""
    config, splits = chosen.config, 1
    if "splits" in chosen.names and not sizes.invariant:
        rows, causal = min(sizes.rows, sizes.reach(config)), sizes.right is not None and sizes.left is None
        splits = splits_of_rows(rows, sizes.keys, causal, sizes.group, sizes.kv_heads, config, chosen.target)
    blocks, heads = -(-sizes.keys // config.block_n), sizes.kv_heads * sizes.sequences
    head_bytes = sizes.rows * _row_bytes(chosen) * sizes.group
    return _in_sections(chosen, blocks, heads, head_bytes, splits, sizes.batch * sizes.kv_heads * sizes.k_len)


def _row_bytes(chosen: Plan) -> int:
    """Bytes of a key and its value, or of a row's operands."""
    problem = chosen.problem
    return (problem.head_dim + problem.value_dim) * problem.dtype.itemsize


def _in_sections(chosen: Plan, blocks: int, heads: int, head_bytes: int, splits: int, part_rows: int) -> Programs:
    """The grid (size of a section, blocks times splits, sections) of `blocks` of so many heads of all sequences.

    head_bytes   that the programs of a head read
    """
    size, count = sections(heads, head_bytes, chosen.target, chosen.config.l2_percent)
    arguments: Arguments = {"first_head": heads - size * count, "splits": None, "part_rows": None}
    if splits > 1:
        arguments |= {"splits": splits, "part_rows": part_rows}
    return Programs((size, blocks * splits, count), arguments)


def over_row_terms(chosen: Plan, sizes: Sizes) -> Programs:
    """For each block of rows: (blocks, heads, sequences)."""
    padded = -(-sizes.rows // ROW_TERMS_ALIGNMENT) * ROW_TERMS_ALIGNMENT
    return Programs((-(-padded // chosen.config.block_m), sizes.q_heads, sizes.sequences), {})


def over_groups(chosen: Plan, sizes: Sizes) -> Programs:
    """For each split of the keys and tile of the rows of a group: (splits times tiles, key heads, sequences).

    The splits depend on shapes and the window, never on lengths or batch.
    """
    longest = sizes.k_len if sizes.left is None else min(sizes.k_len, sizes.left + sizes.q_len)
    splits, tiles = splits_of_capacity(longest, chosen.config), -(-sizes.group * sizes.q_len // chosen.config.block_m)
    part_rows = sizes.batch * sizes.q_heads * sizes.q_len
    return Programs((splits * tiles, sizes.kv_heads, sizes.batch), {"splits": splits, "part_rows": part_rows})


def splits_of_capacity(keys: int, config: TileConfig) -> int:
    return min(-(-keys // (config.block_n * config.split_blocks)), _MOST_SPLITS)
