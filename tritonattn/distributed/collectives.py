"""Collectives with gradients, which all tensors between ranks pass; gradients are summed in the order of ranks."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import Function

from ..core.autograd import first_order
from .layout import Split

_all_gather: Any = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor  # its name before torch 2.13


def all_gather(x: Tensor, split: Split) -> Tensor:
    """x of every rank: [P, *x.shape]."""
    x = x.contiguous()
    out = x.new_empty((split.size * x.numel(),))
    _all_gather(out, x.view(-1), group=split.group)
    return out.view(split.size, *x.shape)


def all_to_all(x: Tensor, split: Split) -> Tensor:
    """Send x[r] of [P, ...] to rank r; return what the ranks sent here, [P, ...]."""
    x = x.contiguous()
    out = torch.empty_like(x)
    dist.all_to_all_single(out, x, group=split.group)
    return out


class Pending(NamedTuple):
    """Tensors on their way from the rank before, and the requests to wait for."""

    tensors: list[Tensor]
    requests: list[Any]

    def wait(self) -> list[Tensor]:
        for request in self.requests:
            request.wait()
        return self.tensors


def pass_on(tensors: list[Tensor], split: Split) -> Pending:
    """Send tensors to the next rank, and receive tensors of the same shapes from the one before."""
    if split.size == 1:
        return Pending(tensors, [])
    ahead, behind = (dist.get_global_rank(split.group, (split.rank + step) % split.size) for step in (1, -1))
    tensors = [x.contiguous() for x in tensors]
    coming = [torch.empty_like(x) for x in tensors]
    operations = [dist.P2POp(dist.isend, x, ahead, split.group) for x in tensors]
    operations += [dist.P2POp(dist.irecv, x, behind, split.group) for x in coming]
    return Pending(coming, dist.batch_isend_irecv(operations))


def gathered(x: Tensor, split: Split, dim: int) -> Tensor:
    """The whole sequence of x along an axis, in its order. Without a gradient."""
    dim %= x.dim()
    return split.in_order(all_gather(x, split).movedim(0, dim).flatten(dim, dim + 1), dim)


def scattered(g: Tensor, split: Split, dim: int) -> Tensor:
    """The sum over ranks of g, at this rank's tokens: the transpose of `gathered`.

    As many bytes as a reduce-scatter; the sum is taken here, in the order of ranks and in g's dtype, so that the same
    world gives the same bits.
    """
    dim %= g.dim()
    g = split.by_rank(g, dim)
    length = g.shape[dim] // split.size
    parts = all_to_all(g.unflatten(dim, (split.size, length)).movedim(dim, 0), split)
    total = parts[0]
    for part in parts[1:]:
        total = total + part
    return total


def gather(x: Tensor, split: Split, dim: int, reduce_dtype: torch.dtype | None = None) -> Tensor:
    """`gathered`, with a gradient that is summed in reduce_dtype, or in its dtype where that is None."""
    return _Gather.apply(x, split, dim, reduce_dtype)


class _Gather(Function):
    @staticmethod
    def forward(ctx, x: Tensor, split: Split, dim: int, reduce_dtype: torch.dtype | None) -> Tensor:
        ctx.settings = split, dim, reduce_dtype or x.dtype, x.dtype
        return gathered(x, split, dim)

    @staticmethod
    @first_order("attention over several ranks")
    def backward(ctx, saved, g: Tensor):
        split, dim, reduce_dtype, dtype = ctx.settings
        return scattered(g.to(reduce_dtype), split, dim).to(dtype), None, None, None


class Wire(NamedTuple):
    """The dtypes in which a tensor and its gradient travel."""

    forward: torch.dtype
    backward: torch.dtype


def heads_to_tokens(x: Tensor, split: Split, wire: Wire) -> Tensor:
    """Exchange all heads of this rank's tokens [B, H, S / P, D] for all tokens of its heads [B, H / P, S, D]."""
    return _Swap.apply(x, split, True, wire)


def tokens_to_heads(x: Tensor, split: Split, wire: Wire) -> Tensor:
    """Exchange all tokens of this rank's heads [B, H / P, S, D] for all heads of its tokens [B, H, S / P, D]."""
    return _Swap.apply(x, split, False, wire)


class _Swap(Function):
    @staticmethod
    def forward(ctx, x: Tensor, split: Split, to_tokens: bool, wire: Wire) -> Tensor:
        ctx.settings = split, to_tokens, wire, x.dtype
        return _swapped(x.to(wire.forward), split, to_tokens).to(x.dtype)

    @staticmethod
    @first_order("attention over several ranks")
    def backward(ctx, saved, g: Tensor):
        split, to_tokens, wire, dtype = ctx.settings
        return _swapped(g.to(wire.backward), split, not to_tokens).to(dtype), None, None, None


def _swapped(x: Tensor, split: Split, to_tokens: bool) -> Tensor:
    if to_tokens:
        got = all_to_all(x.unflatten(1, (split.size, -1)).movedim(1, 0), split)  # [P, B, H / P, S / P, D]
        return split.in_order(got.movedim(0, 2).flatten(2, 3), 2)
    x = split.by_rank(x, 2)
    got = all_to_all(x.unflatten(2, (split.size, -1)).movedim(2, 0), split)
    return got.movedim(0, 1).flatten(1, 2)
