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

# Bytes of the L2 cache: NVIDIA's architecture whitepapers, of the smallest card of a table; AMD's CDNA 2 to 4
# whitepapers, of one die, twice where an Infinity Cache is behind it.
_L2_BYTES = {
    "80": 40 * 2**20,
    "86": 6 * 2**20,
    "89": 48 * 2**20,
    "90": 50 * 2**20,
    "100": 126 * 2**20,
    "120": 96 * 2**20,
    "gfx90a": 8 * 2**20,
    "gfx942": 8 * 2**20,
    "gfx950": 8 * 2**20,
}
_SMALLEST = 4 * 2**20
# Programs along the second and the third axis of a grid (CUDA C++ Programming Guide, table of compute capabilities).
LONGEST_AXIS = 65535
# Dies with one L2 cache each, to which the hardware deals programs in turn (CDNA 3 and 4 whitepapers).
_LANES = {"gfx942": 8, "gfx950": 8}


def lanes(target: Target) -> int:
    """Number of dies to which programs are dealt in turn."""
    return _LANES.get(target.arch, 1)


class Sections(NamedTuple):
    """Heads that run side by side, section after section.

    size    heads of a section, a multiple of the dies
    count   sections; the first has the heads that fill no section
    """

    size: int
    count: int


@functools.lru_cache(maxsize=4096)
def sections(heads: int, bytes_of_head: int, target: Target, l2_percent: int = SHARES["l2_percent"]) -> Sections:
    """Cut heads into sections that fill a share of a die's cache: as many as come nearest, at most 1.5 times as full.

    heads           those of all batch entries, or packed sequences
    bytes_of_head   that the programs of one head read, without those that heads of a group share
    l2_percent      the share, 100 unless a search on the card found another
    """
    share, dies = _L2_BYTES.get(target.arch, _SMALLEST) * l2_percent // 100, lanes(target)
    fit = max(1, share // max(1, bytes_of_head))
    nearest = max(1, round(heads / (fit * dies)))
    size = dies * max(1, min(-(-heads // (nearest * dies)), fit + fit // 2))
    return Sections(size, -(-heads // size))
