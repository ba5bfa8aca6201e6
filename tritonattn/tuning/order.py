"""Order of programs: longest first over as many heads as the L2 cache holds.

A GPU starts the programs of a grid one after another, each as soon as one before it has ended. Under a causal mask the
last block of rows has the most keys. Head after head, the last head's long blocks start when the other processors have
little left; longest first over all heads, short blocks fill the end. Heads are taken in sections whose keys and values
fit the L2 cache, from which the programs of a section read them again and again.

Source: the tile scheduler of FlashAttention-3 for causal calls (Shah et al. 2024, arXiv:2407.08608).
"""

from __future__ import annotations

import functools
import math

from .config import SHARES, Target

# Bytes of the L2 cache: NVIDIA's architecture whitepapers, of the smallest card of a table; AMD's CDNA 2 to 4
# whitepapers, of one die.
_L2_BYTES = {
    "80": 40 * 2**20,
    "86": 6 * 2**20,
    "89": 48 * 2**20,
    "90": 50 * 2**20,
    "100": 126 * 2**20,
    "120": 96 * 2**20,
    "gfx90a": 8 * 2**20,
    "gfx942": 4 * 2**20,
    "gfx950": 4 * 2**20,
}
_SMALLEST = 4 * 2**20
# Programs along the second and the third axis of a grid (CUDA C++ Programming Guide, table of compute capabilities).
LONGEST_AXIS = 65535
# Dies with an L2 cache of their own, to which the hardware deals programs in turn (CDNA 3 and 4 whitepapers).
_LANES = {"gfx942": 8, "gfx950": 8}


def lanes(target: Target) -> int:
    """Number of dies to which programs are dealt in turn."""
    return _LANES.get(target.arch, 1)


@functools.lru_cache(maxsize=4096)
def heads_of_section(heads: int, bytes_of_head: int, target: Target, l2_percent: int = SHARES["l2_percent"]) -> int:
    """Number of heads that run side by side: the largest divisor of `heads` whose heads fit a share of a die's cache.

    A section of n heads puts n / gcd(n, dies) of them on each die. Up to twice as many as fit are taken, where the
    divisors that fit leave half of that share empty. A grid's axis must hold the sections.

    heads           those of all batch entries, or packed sequences
    bytes_of_head   that the programs of one head read, without those that heads of a group share
    l2_percent      the share, 100 unless a search on the card found another
    """
    share = _L2_BYTES.get(target.arch, _SMALLEST) * l2_percent // 100
    fit = max(1, share // max(1, bytes_of_head))
    dies, least = lanes(target), -(-heads // LONGEST_AXIS)
    small = [one for one in range(1, math.isqrt(heads) + 1) if heads % one == 0] or [1]
    on_a_die = {one: one // math.gcd(one, dies) for one in (*small, *(max(heads, 1) // one for one in small))}
    section = max(one for one, count in on_a_die.items() if count <= fit)
    if 2 * on_a_die[section] <= fit:
        section = max(one for one, count in on_a_die.items() if count <= 2 * fit)
    return max(section, min(one for one in on_a_die if one >= least))
