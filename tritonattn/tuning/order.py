"""Order of programs: longest first over as many heads as the L2 cache holds.

A GPU starts the programs of a grid one after another, each as soon as one before it has ended. Under a causal mask the
last block of rows has the most keys. Head after head, the last head's long blocks start when the other processors have
little left; longest first over all heads, short blocks fill the end. Heads are taken in sections whose keys and values
fit the L2 cache, from which the programs of a section read them again and again.

Source: the tile scheduler of FlashAttention-3 for causal calls (Shah et al. 2024, arXiv:2407.08608).
"""

from __future__ import annotations

import functools
from typing import NamedTuple

from .config import SHARES, Target

# Programs along the second and the third axis of a grid (CUDA C++ Programming Guide, table of compute capabilities).
LONGEST_AXIS = 65535


class Sections(NamedTuple):
    """Heads that run side by side, section after section.

    size    heads of a section, a multiple of the dies
    count   sections; the first has the heads that fill no section
    """

    size: int
    count: int


@functools.lru_cache(maxsize=4096)
def sections(heads: int, bytes_of_head: int, target: Target, l2_percent: int = SHARES["l2_percent"]) -> Sections:
    """Cut heads into sections that fill a share of a die's cache as nearly as possible, and at most 1.5 times.

    heads           those of all batch entries, or packed sequences
    bytes_of_head   that the programs of one head read, without those that heads of a group share
    l2_percent      the share, 100 unless a search on the card found another
    """
    share, dies = target.architecture.l2_bytes * l2_percent // 100, target.architecture.dies
    fit = max(1, share // max(1, bytes_of_head))
    nearest = max(1, round(heads / (fit * dies)))
    size = dies * max(1, min(-(-heads // (nearest * dies)), fit + fit // 2))
    return Sections(size, -(-heads // size))
