"""Euclidean norms of keys or queries, and their gradient, where a square would over- or underflow too."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .autograd import apply, save, values_are_read
from .invariance import halving_sum


def key_norms_of(k: Tensor, seen: Tensor | None = None, invariant: bool = False) -> Tensor:
    """Euclidean norms of k [..., D]: [...], fp32 (fp64 for fp64 k).

    seen, bool and broadcastable to [...], names the rows that count: the others have norm 0 and gradient 0
    even where they hold NaN. Where a square would over- or underflow the largest component is factored out.
    The gradient of ||k|| is k / ||k||, and 0 at k = 0. invariant: a norm's bits depend on its key alone.
    """
    return apply(_Norm, k, seen, invariant)


class _Norm(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(k: Tensor, seen: Tensor | None, invariant: bool) -> Tensor:
        if invariant:
            norms = _by_pieces(lambda piece: _norms_of(piece, _invariant_norm), k)
        else:
            norms = _norms_on_cpu(k) if values_are_read(k) else _norms_of(k)
        return norms if seen is None else torch.where(seen, norms, 0)

    @staticmethod
    def setup_context(ctx, inputs, output) -> None:
        save(ctx, inputs[0], output)

    @staticmethod
    def backward(ctx, g: Tensor):
        k, norms = ctx.saved_tensors
        return gradient_of_norms(k, norms, g).to(k.dtype), None, None

    @staticmethod
    def tangent(ctx, of_k: Tensor, *none):
        k, norms = ctx.saved_tensors
        return tangent_of_norms(k, norms, of_k)


def gradient_of_norms(x: Tensor, norms: Tensor, g: Tensor) -> Tensor:
    """g x / ||x|| for g and norms [...] of x [..., D], differentiable; 0 where a norm is, whatever x and g hold."""
    counted = norms > 0
    direction = torch.where(counted[..., None], x, 0) / torch.where(counted, norms, 1)[..., None]
    return direction * torch.where(counted, g, 0)[..., None]


def tangent_of_norms(x: Tensor, norms: Tensor, of_x: Tensor) -> Tensor:
    """The tangent of norms [...] along of_x, likewise."""
    of_x = torch.where((norms > 0)[..., None], of_x, 0)
    return (gradient_of_norms(x, norms, torch.ones_like(norms)) * of_x).sum(-1)


# Keys that are widened at a time: a widened copy of all of k would be the peak of a call's memory.
_ROWS = 1024


def _norms_on_cpu(k: Tensor) -> Tensor:
    """Compute `_norms_of` in one pass, and in full where the results show that a square over- or underflowed.

    Tokens whose heads lie side by side, as packed ones do, are read in that order: from memory in half of the time.
    """
    if k.dim() > 2 and k.stride(-3) < k.stride(-2):
        return _norms_on_cpu(k.transpose(-3, -2)).transpose(-2, -1)
    norms = _norm(k) if k.dtype.itemsize > 2 else _by_pieces(_norm, k)
    lowest, highest = torch.aminmax(norms)
    is_safe = _is_safe(lowest.item()) and _is_safe(highest.item())  # neither where one is NaN
    return norms if is_safe else _by_pieces(_norms_of, k)


def _by_pieces(norms: Callable[[Tensor], Tensor], k: Tensor) -> Tensor:
    if torch.compiler.is_compiling() or k.dim() < 2 or k.shape[-2] <= _ROWS:  # a trace would bind the number of keys
        return norms(k)
    return torch.cat([norms(piece) for piece in k.split(_ROWS, dim=-2)], dim=-1)


def _norms_of(k: Tensor, norm: Callable[[Tensor], Tensor] | None = None) -> Tensor:
    """Norms of k; each key by itself decides whether its largest component is factored out."""
    norm = norm or _norm
    norms = norm(k)
    wide = k.to(norms.dtype)
    largest = wide.abs().amax(-1)
    largest = torch.where(largest > 0, largest, 1)
    factored = largest * norm(wide / largest[..., None])
    return torch.where(_is_safe(norms), norms, factored)


def _is_safe(norms: Any) -> Any:
    """True where a norm, or each of a tensor, comes from squares that neither over- nor underflowed in fp32.

    The bounds are literals: torch.compile(dynamic=True) would make inputs of globals, which two functions cannot share.
    """
    return (norms > 1e-15) & (norms < 1e15)


def _invariant_norm(k: Tensor) -> Tensor:
    wide = k.to(torch.promote_types(k.dtype, torch.float32))
    return halving_sum(wide.square())[..., 0].sqrt()


def _norm(k: Tensor) -> Tensor:
    return torch.linalg.vector_norm(k, dim=-1, dtype=torch.promote_types(k.dtype, torch.float32))
