"""A packed axis as a padded batch and back, for sums that must not run across sequences."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .autograd import apply


@dataclass(frozen=True, eq=False)
class PackedAxis:
    """A packed axis of `total` entries: sequence n has those from starts[n] on, at most `longest`.

    starts   int64 [N + 1]
    """

    starts: Tensor
    longest: int
    total: int

    @property
    def counts(self) -> Tensor:
        """[N]"""
        return self.starts[1:] - self.starts[:-1]

    def unpacked(self, x: Tensor) -> Tensor:
        """[1, H, total] as [N, H, longest], 0 behind each sequence."""
        return apply(_Moved, x, self, False)

    def packed(self, x: Tensor) -> Tensor:
        """[N, H, longest] as [1, H, total], 0 for entries of no sequence."""
        return apply(_Moved, x, self, True)

    def _moved(self, x: Tensor, packs: bool) -> Tensor:
        return self._pack(x) if packs else self._unpack(x)

    def _unpack(self, x: Tensor) -> Tensor:
        if x.numel() == 0:
            return x.new_zeros(self.starts.shape[0] - 1, x.shape[1], self.longest)
        position = torch.arange(self.longest, device=x.device)
        index = (self.starts[:-1, None] + position).clamp(max=max(self.total - 1, 0))  # [N, longest]
        found = x[0][:, index].transpose(0, 1)
        return torch.where((position < self.counts[:, None])[:, None], found, 0)

    def _pack(self, x: Tensor) -> Tensor:
        if x.numel() == 0:
            return x.new_zeros(1, x.shape[1], self.total)
        entry = torch.arange(self.total, device=x.device)
        sequence = torch.searchsorted(self.starts[1:], entry, right=True)
        belongs = sequence < x.shape[0]
        sequence = sequence.clamp(max=x.shape[0] - 1)
        position = (entry - self.starts[sequence]).clamp(max=self.longest - 1)
        return torch.where(belongs, x[sequence, :, position].mT, 0)[None]


class _Moved(torch.autograd.Function):
    """`packed` or `unpacked`: each is the transpose of the other."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x, axis, packs):
        return axis._moved(x, packs)

    @staticmethod
    def setup_context(ctx, inputs, output) -> None:
        _, ctx.axis, ctx.packs = inputs

    @staticmethod
    def backward(ctx, g):
        return ctx.axis._moved(g, not ctx.packs), None, None
