"""Statistics of rows from a record of key norms that is kept beside a KV cache."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol, cast

import torch
from torch import Tensor

from ..core.autograd import runs_eagerly
from ..core.statistics import Statistics
from ..core.visibility import Visibility

# Norms of windows that are held at a time: rows of a long prompt are taken in parts.
_ENTRIES = 2**24


class KeyRecord(Protocol):
    """A record, asked by a key's place along the key axis of a visibility; places are int64 [B or 1, n]."""

    dtype: torch.dtype

    def norms(self, k_len: int) -> Tensor:
        """[B, Hkv, Sk]"""
        ...

    def norms_at(self, key: Tensor, wanted: Tensor) -> Tensor:
        """[B, Hkv, n], 0 where not wanted."""
        ...

    def of_rows(self, name: str, visibility: Visibility) -> Tensor:
        """A sum or maximum, by its name, over the keys of each row, all up to its last: [B, Hkv, Sq]."""
        ...


class CachedStatistics(Statistics):
    """The row statistics of a visibility from a record; k itself is not read.

    computed   statistics of the same keys: norms of queries are theirs, and prefix sums where `visibility.invariant`,
               since sums then come from the norms, as without a record
    width      rows see at most as many keys, or None: all of their sequence before the end of their range

    Rows that see all keys before their own read the record's prefix sums and maxima. Rows of a window read the norms
    inside it: a difference of prefix sums would keep the NaN, inf or rounding of keys that have left the window.
    """

    def __init__(self, computed: Statistics, record: KeyRecord, width: int | None) -> None:
        super().__init__(lambda: computed.k, computed.visibility)
        self._record = record
        self._width = width
        self._scan = computed._scan
        self._norms_of = computed._norms_of

    def _norms(self) -> Tensor:
        norms = self._record.norms(self.visibility.k_len)
        counted = self.visibility.counted_keys(lambda: norms)
        return norms if counted is None else torch.where(counted, norms, 0)

    def _norm_sum(self) -> Tensor:
        if self.visibility.invariant:
            return super()._norm_sum()
        if self._width is None:
            sums = self._record.of_rows("norm_sums", self.visibility)
        else:
            sums = self._over_windows(lambda norms: norms.sum(-1, dtype=torch.float64))
        return sums.to(self._record.dtype)

    def _norm_square_sum(self) -> Tensor:
        if self.visibility.invariant:
            return super()._norm_square_sum()
        if self._width is None:
            return self._record.of_rows("norm_square_sums", self.visibility)
        return self._over_windows(lambda norms: norms.double().square().sum(-1))

    def _norm_max(self) -> Tensor:
        if self._width is None:
            return self._record.of_rows("norm_maxima", self.visibility)
        return self._over_windows(lambda norms: norms.amax(-1))

    def _over_windows(self, reduce: Callable[[Tensor], Tensor]) -> Tensor:
        """reduce(norms of the keys that rows see, 0 in place of others [B, Hkv, rows, width]) -> [B, Hkv, rows]."""
        lo, hi = self.visibility.ranges()  # [B, Sq]
        batch, kv_heads, k_len = self.visibility.keys
        width = max(1, min(cast(int, self._width), k_len))  # an axis without entries has no maximum
        q_len = lo.shape[1]
        step = max(1, _ENTRIES // max(batch * kv_heads * width, 1)) if runs_eagerly(lo) else q_len
        parts = []
        for first in range(0, max(q_len, 1), max(step, 1)):
            rows = slice(first, first + step)
            key = lo[:, rows, None] + torch.arange(width, device=lo.device)  # [B, rows, width]
            seen = key < hi[:, rows, None]
            norms = self._record.norms_at(key.flatten(1), seen.flatten(1))
            parts.append(reduce(norms.unflatten(2, (-1, width))))
        return parts[0] if len(parts) == 1 else torch.cat(parts, -1)
