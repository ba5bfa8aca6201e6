"""Key statistics of a sequence that several ranks share: totals of chunks travel, not keys.

Chunk c of a causal sequence adds to its prefix sums what all earlier chunks hold, C numbers a head. Gradients go
the other way: a key takes the sum of the rows behind it, those of later chunks by their totals. Where rows attend to
other ranges, the norms themselves are gathered, 4 bytes a key.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd.function import Function
from torch.nn.functional import pad

from ..core.autograd import first_order
from ..core.ranges import argmax_of_prefixes, prefix_sum
from ..core.statistics import Statistics, key_norms_of
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
        sums = _Sum if self.visibility.is_full else _PrefixSum
        return sums.apply(x, self._split).expand(*x.shape[:2], self.visibility.q_len)

    def _norm_max(self) -> Tensor:
        if not self._by_totals:
            return super()._norm_max()
        return _PrefixMax.apply(self._local, self._split, self.visibility.is_full)


class _Sum(Function):
    """Sum of x [B, H, S / P] over the whole sequence: fp64 [B, H, 1]."""

    @staticmethod
    def forward(ctx, x: Tensor, split: Split) -> Tensor:
        ctx.settings = split, x.shape, x.dtype
        return collectives.all_gather(x.sum(-1, keepdim=True, dtype=torch.float64), split).sum(0)

    @staticmethod
    @first_order
    def backward(ctx, saved, g: Tensor):
        split, shape, dtype = ctx.settings
        return collectives.all_gather(g, split).sum(0).to(dtype).expand(shape), None


class _PrefixSum(Function):
    """Sums of x [B, H, S / P] over j <= i of the whole sequence: fp64 [B, H, S / P]."""

    @staticmethod
    def forward(ctx, x: Tensor, split: Split) -> Tensor:
        ctx.settings = split, x.dtype
        local = prefix_sum(_in_chunks(x, split))  # [B, H, this rank's chunks, n + 1]
        earlier = prefix_sum(collectives.gathered(local[..., -1], split, -1))  # [B, H, chunks + 1]
        return (local[..., 1:] + earlier[..., split.chunks(), None]).flatten(-2)

    @staticmethod
    @first_order
    def backward(ctx, saved, g: Tensor):
        split, dtype = ctx.settings
        local = _suffix_sum(_in_chunks(g, split))
        later = _suffix_sum(collectives.gathered(local[..., 0], split, -1))[..., 1:]
        return (local[..., :-1] + later[..., split.chunks(), None]).flatten(-2).to(dtype), None


class _PrefixMax(Function):
    """Maxima of x [B, H, S / P] over j <= i, or over all keys; the lowest of equal keys takes the gradient."""

    @staticmethod
    def forward(ctx, x: Tensor, split: Split, is_full: bool) -> Tensor:
        x = _in_chunks(x, split)  # [B, H, this rank's chunks, n]
        best = collectives.gathered(x.amax(-1), split, -1)  # [B, H, chunks]
        if is_full:
            before, owner = (y.expand_as(best) for y in best.max(-1, keepdim=True))
        else:  # of earlier chunks
            before = pad(best.cummax(-1).values, (1, -1), value=-torch.inf)
            owner = pad(argmax_of_prefixes(best), (1, -1))
        before = before[..., split.chunks(), None]
        local = x.cummax(-1).values
        is_inherited = before >= local  # the lowest of equal keys is in the earlier chunk
        ctx.settings = split
        ctx.save_for_backward(is_inherited, argmax_of_prefixes(x.flatten(0, 2)[None]).view_as(x), owner, x.argmax(-1))
        return torch.where(is_inherited, before, local).flatten(-2)

    @staticmethod
    @first_order
    def backward(ctx, saved, g: Tensor):
        is_inherited, first, owner, top = saved
        split = ctx.settings
        g = _in_chunks(g, split)
        d_x = torch.zeros_like(g).scatter_add_(-1, first, torch.where(is_inherited, 0, g))
        away = collectives.gathered(torch.where(is_inherited, g, 0).double().sum(-1), split, -1)
        for i, chunk in enumerate(split.chunks()):
            taken = torch.where(owner == chunk, away, 0).sum(-1, keepdim=True)
            d_x[..., i, :].scatter_add_(-1, top[..., i, None], taken.to(d_x.dtype))
        return d_x.flatten(-2), None, None


def _in_chunks(x: Tensor, split: Split) -> Tensor:
    return x.unflatten(-1, (split.chunks_per_rank, -1))


def _suffix_sum(x: Tensor) -> Tensor:
    """fp64 sums of x over [j, n), j = 0 .. n: [..., n] -> [..., n + 1]."""
    return prefix_sum(x.flip(-1)).flip(-1)
