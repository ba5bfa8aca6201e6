"""Norms of cached keys with running sums and maxima, in any layout, and the statistics of rows from them."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from .ranges import prefix_sum
from .sequences import PageTable
from .statistics import Statistics, counted_keys

TOTALS = ("norm_sums", "norm_square_sums", "norm_maxima")

# Norms of windows that are held at a time: rows of a long prompt are taken in parts.
_ENTRIES = 2**24


def zeros(shapes: Iterable[tuple[int, ...]], dtype: Any, device: Any) -> tuple[Tensor, ...]:
    """Norms, their sums, sums of squares, both in fp64, and maxima of these shapes."""
    if dtype not in (torch.float32, torch.float64):
        raise TypeError(f"dtype: expected torch.float32 or torch.float64, got {dtype}")
    dtypes = (dtype, torch.float64, torch.float64, dtype)
    return tuple(torch.zeros(shape, dtype=x, device=device) for shape, x in zip(shapes, dtypes, strict=True))


class CachedNorms:
    """The norm of each cached key, and `TOTALS` of the keys of its sequence up to and with it.

    A layout says where the entries of a key are, reads them and writes them: `find`, `at` and `_put`.
    """

    _memory: tuple[Tensor, ...]  # norms and `TOTALS`, with entries for keys that are dropped

    @property
    def norms(self) -> Tensor:
        return self._shown(self._memory[0])

    @property
    def norm_sums(self) -> Tensor:
        return self._shown(self._memory[1])

    @property
    def norm_square_sums(self) -> Tensor:
        return self._shown(self._memory[2])

    @property
    def norm_maxima(self) -> Tensor:
        return self._shown(self._memory[3])

    def _shown(self, x: Tensor) -> Tensor:
        """A tensor of `_memory` without entries for dropped keys. A view made now: pickled views share no memory."""
        raise NotImplementedError

    def find(self, key: Tensor, table: PageTable | None) -> Any:
        """The positions of the entries of `key`, int64 [B or 1, n], by its number along the axis of the call's keys.

        A key below 0 has none. table: of a cache in pages.
        """
        raise NotImplementedError

    def at(self, name: str, found: Any) -> Tensor:
        """The entries of found keys in a buffer: [B, Hkv, n], 0 for a key that has none."""
        raise NotImplementedError

    def _put(self, found: Any, entries: tuple[Tensor, ...]) -> None:
        """Write the norms and `TOTALS`, [B, Hkv, n], of found keys; those that have no entries are dropped."""
        raise NotImplementedError

    def _extend(self, norms: Tensor, found: Any, last: Any) -> None:
        """Enter the norms [B, Hkv, n] of the next keys, 0 where dropped; last: found keys before them, [B, 1].

        On a CPU the bits do not depend on how keys are cut into appends.
        """
        norms = norms.to(self.norms.dtype)
        sums, squares, highest = (self.at(name, last) for name in TOTALS)
        sums = prefix_sum(torch.cat([sums, norms], -1))[..., 2:]
        squares = prefix_sum(torch.cat([squares, norms.double().square()], -1))[..., 2:]
        self._put(found, (norms, sums, squares, torch.cat([highest, norms], -1).cummax(-1).values[..., 1:]))

    def along_keys(self, k_len: int, table: PageTable | None) -> Tensor:
        """The norms of all keys: [B, Hkv, Sk]."""
        return self.at("norms", self.find(torch.arange(k_len, device=self.norms.device)[None], table))


class StatisticsOfCache(Statistics):
    """The statistics of rows from cached norms; k itself is not read.

    computed   statistics of the same keys: norms of queries are theirs, and prefix sums where `visibility.invariant`,
               since sums then come from the norms, as without cached ones
    table      of a cache in pages, or None
    width      rows attend to at most as many keys, or None: all of their sequence before the end of their range

    Rows that attend to all keys before theirs read the cached sums and maxima. Rows of a window read the norms inside
    it: a difference of sums would keep the NaN, inf or rounding of keys that have left the window.
    """

    def __init__(self, computed: Statistics, cached: CachedNorms, table: PageTable | None, width: int | None) -> None:
        super().__init__(lambda: computed.k, computed.visibility)
        self._scan = computed._scan
        self._computed, self._cached, self._table, self._width = computed, cached, table, width

    def _norms_of(self, x: Tensor, seen: Tensor | None) -> Tensor:
        return self._computed._norms_of(x, seen)

    def _norms(self) -> Tensor:
        norms = self._cached.along_keys(self.visibility.k_len, self._table)
        counted = counted_keys(self.visibility, lambda: norms)
        return norms if counted is None else torch.where(counted, norms, 0)

    def _norm_sum(self) -> Tensor:
        if self.visibility.invariant:
            return super()._norm_sum()
        sums = self._of_rows("norm_sums", lambda norms: norms.sum(-1, dtype=torch.float64))
        return sums.to(self._cached.norms.dtype)

    def _norm_square_sum(self) -> Tensor:
        if self.visibility.invariant:
            return super()._norm_square_sum()
        return self._of_rows("norm_square_sums", lambda norms: norms.double().square().sum(-1))

    def _norm_max(self) -> Tensor:
        return self._of_rows("norm_maxima", lambda norms: norms.amax(-1))

    def _of_rows(self, name: str, reduce: Callable[[Tensor], Tensor]) -> Tensor:
        """The entry of each row's last key, or reduce(norms in its window [B, Hkv, rows, width]): [B, Hkv, Sq]."""
        cached, table, visible = self._cached, self._table, self.visibility
        if self._width is None:
            return cached.at(name, visible.once("last keys", lambda: cached.find(visible.last_keys(), table)))
        lo, hi = visible.ranges()  # [B or 1, Sq]
        batch, kv_heads, k_len = visible.keys
        width = max(1, min(self._width, k_len))  # an axis without entries has no maximum
        step = max(1, visible.q_len if torch.compiler.is_compiling() else _ENTRIES // max(batch * kv_heads * width, 1))
        parts = []
        for first in range(0, max(visible.q_len, 1), step):
            rows = slice(first, first + step)
            key = lo[:, rows, None] + torch.arange(width, device=lo.device)  # [B or 1, rows, width]
            key = torch.where(key < hi[:, rows, None], key, -1)
            norms = cached.at("norms", cached.find(key.flatten(1), table))
            parts.append(reduce(norms.unflatten(2, (-1, width))))
        return parts[0] if len(parts) == 1 else torch.cat(parts, -1)
