"""Splits: programs that share a row's keys, or a key's rows, where a call has fewer programs than a GPU runs at once.

Each split writes fp32 results, its part, and another kernel joins them. The number of splits decides which sums are
rounded, so it never depends on the batch: not on its entries, nor on what sequences hold.
"""

from __future__ import annotations

import functools

from .config import Target, TileConfig, is_short
from .gpus import nearest

_MOST = 64
_FEW_ROWS = 1024  # a row's part is as long as the row's output: more rows would move more of parts than of keys
_HEADS = 32  # for which calls of few rows are split, whatever their own number
# Keys that a program of few rows multiplies in the time that its part takes to be written and read; rows, likewise, of
# a program of grad_key_value (modelled: 8 bytes a number, and about 90 FLOP in the time of a byte of the L2 cache).
_PRICE = 256
# Length of a split. The parts of a large batch, which needs none, then take half as long as its products at the most;
# those of gradients, with which a batch is more often large, a sixteenth.
_SHORTEST = 2 * _PRICE
_SHORTEST_OF_GRADIENTS = 16 * _PRICE
# Warps of 255 registers that a processor holds at once: NVIDIA's has 2^16 registers, AMD's 4 * 512 of whole waves.
_WARPS = 8


def splits_of_cache(keys: int, config: TileConfig) -> int:
    """Splits of the keys of a decode call, which waits for memory: as many as `split_blocks` allows."""
    return min(-(-keys // (config.block_n * config.split_blocks)), _MOST)


def splits_of_keys(rows: int, keys: int, config: TileConfig, target: Target) -> int:
    """Splits of the keys that a block of rows sees in a forward call: 1 but for few rows and many keys.

    rows, keys   of the longest sequence; of a window, the keys that a block sees
    """
    if rows > _FEW_ROWS or is_short(rows, keys):
        return 1
    programs = _HEADS * -(-rows // config.block_m)
    return _soonest(programs, keys, config.block_n, _SHORTEST, places(config, target))


def splits_of_rows(rows: int, keys: int, group: int, kv_heads: int, config: TileConfig, target: Target) -> int:
    """Splits of the rows of a group's heads that grad_key_value goes through for a block of keys."""
    programs = kv_heads * -(-keys // config.block_n)
    return _soonest(programs, group * rows, config.block_m, _SHORTEST_OF_GRADIENTS, places(config, target))


def places(config: TileConfig, target: Target) -> int:
    """Programs that a GPU runs at once. Without a device, those of the first card of its architecture."""
    processors = target.processors or next((gpu.processors for gpu in nearest(target)), 128)
    return processors * max(1, _WARPS // config.num_warps)


@functools.lru_cache(maxsize=4096)
def _soonest(programs: int, length: int, step: int, shortest: int, places: int) -> int:
    """The splits with which programs that go through `length` in steps end first; the fewest of those.

    time(s) = ceil(programs * s / places) * (ceil(length / (step * s)) * step + (price if s > 1))
    """

    def time(splits: int) -> int:
        longest = -(-length // (step * splits)) * step
        return -(-programs * splits // places) * (longest + _PRICE * (splits > 1))

    return min(range(1, max(1, min(length // shortest, _MOST)) + 1), key=time)
