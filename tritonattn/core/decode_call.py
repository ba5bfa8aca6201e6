"""One decode call as plain tensors: a few new queries against a KV cache, contiguous or in pages."""

from __future__ import annotations

from typing import NamedTuple

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
        sizes = (self.batch, q_heads, self.kv_heads, q_len, self.capacity)
        rows = self.query_lengths
        return Visibility.of_padded(sizes, q.device, self.key_lengths, rows, left=left, invariant=invariant)

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
        visible = cache.visibility(self.q, self.left, self.invariant).as_ranges()
        return AttentionCall(self.q, k, v, visible, self.logits, block_table=cache.block_table)
