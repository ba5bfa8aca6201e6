"""Key statistics of a sequence that several ranks share: totals of chunks travel, not keys.

Chunk c of a causal sequence adds the totals of all earlier chunks to its prefix sums, C numbers a head. Gradients go
the other way: a key takes the sum of the rows behind it, those of later chunks by their totals. Where rows attend to
other ranges, the norms themselves are gathered, 4 bytes a key.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad

from ..core.norms import key_norms_of
from ..core.ranges import argmax_of_prefixes, prefix_sum
from ..core.statistics import Statistics
from ..core.visibility import Visibility
from . import collectives
from .layout import Split


class SharedStatistics(Statistics):
    """`Statistics` of this rank's rows and of all keys, from the keys k [B, Hkv, S / P, D] that this rank holds.

    by_totals   row i of the sequence attends to the keys j <= i, or, where no row's range ends early, all of them
    """

    def __init__(self, k: Tensor, visibility: Visibility, split: Split, by_totals: bool) -> None:
        super().__init__(k, visibility)
        self._split = split
        self._by_totals = by_totals

    @property
    def _local(self) -> Tensor:
        """Norms of this rank's keys: [B, Hkv, S / P]. The row of a key attends to it at least."""
        return self._once("local", lambda: key_norms_of(self.k))

    def _norms(self) -> Tensor:
        return collectives.gather(self._local, self._split, 2)

    def _norm_sum(self) -> Tensor:
        return self._total(self._local).to(self._local.dtype) if self._by_totals else super()._norm_sum()

    def _norm_square_sum(self) -> Tensor:
        return self._total(self._local.double().square()) if self._by_totals else super()._norm_square_sum()

    def _total(self, x: Tensor) -> Tensor:
        if not self.visibility.is_full:
            return running_sum(x, self._split)
        sums = in_chunks(x.double(), self._split).sum(-1)  # [B, Hkv, chunks of this rank]
        total = collectives.gather(sums, self._split, -1).sum(-1, keepdim=True)
        return total.expand(*x.shape[:2], self.visibility.q_len)

    def _norm_max(self) -> Tensor:
        if not self._by_totals:
            return super()._norm_max()
        split, x = self._split, in_chunks(self._local.double(), self._split)  # [B, Hkv, chunks of this rank, n]
        local = x.gather(-1, argmax_of_prefixes(x.detach()))  # the lowest of equal keys takes the gradient
        of_chunks = collectives.gather(local[..., -1], split, -1)  # [B, Hkv, chunks]
        best = of_chunks.gather(-1, argmax_of_prefixes(of_chunks.detach()))
        if self.visibility.is_full:
            return best[..., -1:].expand(*best.shape[:2], self.visibility.q_len).to(self._local.dtype)
        before = pad(best, (1, -1), value=-torch.inf)[..., split.chunks(), None]  # of earlier chunks
        return torch.where(before >= local, before, local).flatten(-2).to(self._local.dtype)


def running_sum(x: Tensor, split: Split) -> Tensor:
    """Sums of x [..., S / P] over j <= i of the whole sequence: fp64 [..., S / P]."""
    sums = prefix_sum(in_chunks(x, split))  # [..., chunks of this rank, n + 1]
    earlier = prefix_sum(collectives.gather(sums[..., -1], split, -1))[..., split.chunks()]
    return (earlier[..., None] + sums[..., 1:]).flatten(-2)


def in_chunks(x: Tensor, split: Split) -> Tensor:
    return x.unflatten(-1, (split.chunks_per_rank, -1))
