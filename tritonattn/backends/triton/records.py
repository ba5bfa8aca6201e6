"""The record of the kernels of key statistics; those of attention, and the rules for records, are in `block`."""

from __future__ import annotations

from typing import Any, NamedTuple


class KeyBuffers(NamedTuple):
    """The buffers of a `KeyStatistics`, or, as `Scale` and without counts, of a `PagedKeyStatistics`."""

    counts: Any
    counts_after: Any
    norms: Any
    norm_sums: Any
    norm_square_sums: Any
    norm_maxima: Any
