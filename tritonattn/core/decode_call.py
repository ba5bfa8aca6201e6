"""One decode call as plain tensors: a few new queries against a KV cache, contiguous or in pages."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple, cast

import torch
from torch import Tensor

from .call import AttentionCall, Logits
from .pages import PageTable
from .visibility import Visibility

LONGEST_QUERY = 16  # rows


class Cache(NamedTuple):
    """The keys and values of B sequences, of which the first key_lengths[b] count.

    k, v          [B, Hkv, capacity, D], [B, Hkv, capacity, Dv], or with a block table pages [N, page, Hkv, D] and
                  [N, page, Hkv, Dv]; any strides
    key_lengths   int [B]; values outside [0, capacity] are clamped
    block_table   int32 [B, max_pages] or None: key j of sequence b lies in page block_table[b, j // page], at j % page.
                  Entries outside [0, N) and those behind key_lengths are not followed: keys and values there are zeros.
    query_lengths int [B] or None: the rows of each sequence, the first of a call's Sq; clamped to [0, Sq]. None: all.
    """

    k: Tensor
    v: Tensor
    key_lengths: Tensor
    block_table: Tensor | None = None
    query_lengths: Tensor | None = None

    @property
    def batch(self) -> int:
        return self.key_lengths.shape[0]

    @property
    def kv_heads(self) -> int:
        return self.k.shape[1 if self.block_table is None else 2]

    @property
    def page(self) -> int:
        """Keys of one page; of a contiguous cache, its capacity."""
        return self.k.shape[2 if self.block_table is None else 1]

    @property
    def capacity(self) -> int:
        """The most keys that a sequence can have."""
        return self.k.shape[2] if self.block_table is None else self.page * self.block_table.shape[1]

    def visibility(self, q: Tensor, left: int | None, invariant: bool = False) -> Visibility:
        """Row i of q [B, Hq, Sq, D] sees own - left <= j <= own, with own = i + key_lengths[b] - query_lengths[b].

        Rows at i >= query_lengths[b] see nothing.
        """
        _, q_heads, q_len, _ = q.shape
        return _CacheVisibility(
            self.batch,
            q_heads,
            self.kv_heads,
            q_len,
            self.capacity,
            q.device,
            left=left,
            key_lengths=self.key_lengths,
            invariant=invariant,
            query_lengths=self.query_lengths,
        )

    def heads_first(self) -> tuple[Tensor, Tensor]:
        """k and v as [B, Hkv, capacity, D or Dv], or pages as [N, Hkv, page, D or Dv]."""
        if self.block_table is None:
            return self.k, self.v
        return self.k.transpose(1, 2), self.v.transpose(1, 2)

    def keys(self) -> Tensor:
        """[B, Hkv, capacity, D]; pages are gathered."""
        return self._gathered(self.k)

    def values(self) -> Tensor:
        """[B, Hkv, capacity, Dv]; pages are gathered."""
        return self._gathered(self.v)

    def _gathered(self, x: Tensor) -> Tensor:
        if self.block_table is None:
            return x
        key = torch.arange(self.capacity, device=x.device)[None]
        found = PageTable(self.block_table, self.page).gather(x, key, key < self.key_lengths[:, None])
        return found.transpose(1, 2)


@dataclass(frozen=True, eq=False)
class _CacheVisibility(Visibility):
    """Visibility of rows at the end of their sequence's key_lengths, not of the capacity."""

    query_lengths: Tensor | None = None

    @property
    def is_bottom_right(self) -> bool:
        return False

    @property
    def begins_at_first(self) -> bool:
        return self.left is None and self.query_lengths is None

    def counts(self) -> Tensor:
        return self._ends()[:, None].double() if self.begins_at_first else super().counts()

    def _ends(self) -> Tensor:
        """One past the last key that each row sees: int64 [B, Sq]."""
        lengths = self._key_lengths()
        if self.q_len == 1 and self.query_lengths is None:
            return lengths
        order = torch.arange(self.q_len, device=self.device)
        return torch.minimum(lengths + (order + 1 - self._rows()), lengths).clamp(min=0)

    def _ranges(self) -> tuple[Tensor, Tensor]:
        hi = self._ends()
        lo = torch.zeros_like(hi) if self.left is None else (hi - (self.left + 1)).clamp(min=0)
        if self.query_lengths is None:
            return lo, hi
        is_row = torch.arange(self.q_len, device=self.device) < self._rows()
        return torch.where(is_row, lo, hi), hi

    def _key_lengths(self) -> Tensor:
        return cast(Tensor, self.key_lengths).long().clamp(0, self.k_len)[:, None]  # [B, 1]

    def _rows(self) -> Tensor | int:
        return self.q_len if self.query_lengths is None else self.query_lengths.long().clamp(0, self.q_len)[:, None]


class DecodeCall(NamedTuple):
    """The softmax of `logits` times v, over the keys that row i of sequence b sees: own - left <= j <= own, with
    own = i + key_lengths[b] - query_lengths[b], of its first query_lengths[b] rows; the others see nothing.

    q        [B, Hq, Sq, D] in the cache's dtype; any strides
    logits   with a key_scale of [B, Hkv, capacity], a key_bias of [B, Hkv, Hq / Hkv, capacity]
    left     keys before its own that a row sees; None is all

    invariant   as in `AttentionCall`
    """

    q: Tensor
    cache: Cache
    logits: Logits
    left: int | None = None
    invariant: bool = False

    def as_attention(self) -> AttentionCall:
        """The call over the whole cache, in its pages where it has some."""
        cache, (k, v) = self.cache, self.cache.heads_first()
        ranges = torch.stack(cache.visibility(self.q, self.left).ranges(), dim=-1)
        keys = torch.Size((cache.batch, cache.kv_heads, cache.capacity, k.shape[3]))
        visible = Visibility.of_shapes(self.q.shape, keys, self.q.device, key_ranges=ranges, invariant=self.invariant)
        return AttentionCall(self.q, k, v, visible, self.logits, block_table=cache.block_table)
