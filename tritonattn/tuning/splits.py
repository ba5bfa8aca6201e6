"""Splits: programs that share a row's keys, or a key's rows, where a call has fewer programs than a GPU runs at once.

Each split writes fp32 results, its part, and another kernel joins them. The number of splits decides which sums are
rounded, so it never depends on the batch: not on its entries, nor on what sequences hold.
"""

from __future__ import annotations

import functools
import math

from .config import SHORT, Target, TileConfig
from .gpus import nearest

_MOST = 64
_FEW_ROWS = 1024  # a row's part is as long as the row's output: more rows would move more of parts than of keys
_HEADS = 32  # calls of few rows are split as if they had so many, whatever their number
# Overheads of a program, in the time of so many keys of its loop (of gradients: rows). FIXED is spent outside of the
# loop (as in perf/models/schedule.py), PRICE until its part is written and read (modelled: 8 bytes per number, and
# about 90 FLOP in the time of a byte of the L2 cache).
FIXED = 192
PRICE = 256
# Shortest split. Where a batch is so large that it needs no splits, their parts cost at most half the time of the
# products; of gradients, which more often have such batches, an eighth.
_SHORTEST = 2 * PRICE
_SHORTEST_OF_GRADIENTS = 8 * PRICE
# Warps of 255 registers that a processor holds at once: NVIDIA's has 2^16 registers, AMD's 4 * 512 of whole waves.
_WARPS = 8


def splits_of_keys(rows: int, keys: int, config: TileConfig, target: Target) -> int:
    """Splits of the keys that a block of rows attends to in a forward call: 1 but for few rows and many keys.

    rows, keys   of the longest sequence; of a window, the keys that a block attends to
    """
    if rows > _FEW_ROWS or max(rows, keys) <= SHORT:
        return 1
    programs = _HEADS * -(-rows // config.block_m)
    return _soonest(programs, keys, config.block_n, keys // _SHORTEST, resident(config, target))


def splits_of_rows(
    rows: int, keys: int, causal: bool, group: int, kv_heads: int, config: TileConfig, target: Target
) -> int:
    """Splits of the rows of a group's heads that grad_key_value goes through for a block of keys.

    1 where the programs of one batch entry are more than half of those that run at once. Under a causal mask the mean
    program is shorter than the longest, in whose time several others run one after another.
    """
    programs, most = kv_heads * -(-keys // config.block_n), resident(config, target)
    if rows == 0 or not 0 < 2 * programs <= most:
        return 1
    rows = min(rows, keys) if causal else rows
    mean = 1 - rows / (2 * keys) if causal else 1.0
    length = group * rows
    return _soonest(programs * mean, length, config.block_m, int(length * mean) // _SHORTEST_OF_GRADIENTS, most)


def resident(config: TileConfig, target: Target) -> int:
    """Programs that a GPU runs at once; without a device, the first card of its architecture."""
    processors = target.processors or next((gpu.processors for gpu in nearest(target)), 128)
    return processors * max(1, _WARPS // config.num_warps)


@functools.lru_cache(maxsize=4096)
def _soonest(programs: float, length: int, step: int, most: int, at_once: int) -> int:
    """The number of splits, from 1 to `most`, that ends soonest: the least of several that are equal.

    Each program goes through its part of `length` in steps, `at_once` programs at a time.

    time(s) = ceil(programs * s / at_once) * (ceil(length / (step * s)) * step + fixed + (price if s > 1))
    """

    def time(splits: int) -> int:
        longest = -(-length // (step * splits)) * step
        return math.ceil(programs * splits / at_once) * (longest + FIXED + PRICE * (splits > 1))

    return min(range(1, max(1, min(most, _MOST)) + 1), key=time)
