"""`tritonattn::key_norms`, its gradient, and the passes over ranges of the "triton" backend."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import Function

from ..backends import kernels
from ..core.autograd import apply, first_order, is_transformed, needs_graph, runs_eagerly
from ..core.call import AttentionCall
from ..core.statistics import Statistics
from .mapping import in_one_batch
from .schema import operator


def _prefix_sum(x: Tensor) -> Tensor:
    """`ranges.prefix_sum` of x [B, H, n] in the "triton" backend: one launch instead of dozens on a GPU."""
    return kernels().prefix_sums(x) if runs_eagerly(x) else _prefix_sums_operator(x)


def _argmax_over_ranges(x: Tensor, lo: Tensor, hi: Tensor) -> Tensor:
    """`ranges.argmax_over_ranges` in the "triton" backend: one launch instead of a dozen a power of two."""
    run = kernels().argmax_over_ranges if runs_eagerly(x, lo, hi) else _argmax_operator
    return run(x, lo, hi)


class KernelStatistics(Statistics):
    """Statistics whose norms, prefix sums and maxima come from kernels of the "triton" backend.

    Norms take one pass over keys or queries, where torch's operators on a GPU take several over copies in fp32.
    """

    _scan = staticmethod(_prefix_sum)
    _argmax = staticmethod(_argmax_over_ranges)

    _has_values = False

    def _counted_keys(self) -> Tensor | None:
        visible = self.visibility
        if visible.sees_every_key:
            return None
        if visible.invariant or not runs_eagerly(visible.key_lengths, visible.key_ranges):
            return super()._counted_keys()
        return kernels().seen_keys(visible)

    def _norms_of(self, x: Tensor, seen: Tensor | None) -> Tensor:
        if not (needs_graph(x) or is_transformed()):
            return _key_norms(x, seen)
        self._has_values = x.dtype == torch.float32 or not runs_eagerly(x)
        norms, wide = apply(_NormsAndInput, x, seen, self._has_values)
        self.wide.append((x, wide))
        return norms

    def widened(self, call: AttentionCall) -> AttentionCall:
        if not self.wide:
            return call
        wide = {id(x): other for x, other in self.wide}
        q, k = wide.get(id(call.q)), wide.get(id(call.k))
        if not self._has_values:
            return replace(call, wide_q=q, wide_k=k)
        return replace(call, q=call.q if q is None else q, k=call.k if k is None else k)


@operator("prefix_sums", "Tensor x", "Tensor sums")
def _prefix_sums_operator(x):
    return kernels().prefix_sums(x)


@_prefix_sums_operator.register_fake
def _(x):
    return x.new_empty((*x.shape[:-1], x.shape[-1] + 1), dtype=torch.float64)


@operator("argmax_over_ranges", "Tensor x, Tensor lo, Tensor hi", "Tensor keys")
def _argmax_operator(x, lo, hi):
    return kernels().argmax_over_ranges(x, lo, hi)


@_argmax_operator.register_fake
def _(x, lo, hi):
    return lo.new_empty((*x.shape[:-1], lo.shape[-1]))


@operator("key_norms", "Tensor k, Tensor? seen", "Tensor norms")
def _key_norms_operator(k, seen):
    return kernels().key_norms(k, seen)


@_key_norms_operator.register_fake
def _(k, seen):
    return k.new_empty(k.shape[:3], dtype=torch.float32)


def _key_norms(k: Tensor, seen: Tensor | None) -> Tensor:
    return kernels().key_norms(k, seen) if runs_eagerly(k, seen) else _key_norms_operator(k, seen)


@operator("key_norms_backward", "Tensor k, Tensor? seen, Tensor norms, Tensor d_norms, Tensor? added", "Tensor d_k")
def _key_norms_backward_operator(k, seen, norms, d_norms, added):
    return kernels().key_norms_backward(k, seen, norms, d_norms, added)


@_key_norms_backward_operator.register_fake
def _(k, seen, norms, d_norms, added):
    return k.new_empty(k.shape)


class _NormsAndInput(Function):
    """Norms of x [B, H, S, D], fp32 [B, H, S], and fp32 of x's shape: gradients of both are added, and rounded once.

    has_values   the second holds the values of x; else it has no memory, and only takes a gradient
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(x, seen, has_values):
        if has_values:
            wide = x.view_as(x) if x.dtype == torch.float32 else x.float()
        else:
            wide = x.new_empty((), dtype=torch.float32).expand(x.shape)
        return _key_norms(x, seen), wide

    @staticmethod
    def setup_context(ctx, inputs, output) -> None:
        x, seen, _ = inputs
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(x, seen, output[0])

    @staticmethod
    @first_order
    def backward(ctx, saved, d_norms, d_wide):
        x, seen, norms = saved
        if d_norms is None:
            return (None if d_wide is None else d_wide.to(x.dtype)), None, None
        eager = runs_eagerly(*saved, d_norms, d_wide)
        run = kernels().key_norms_backward if eager else _key_norms_backward_operator
        return run(x, seen, norms, d_norms, d_wide), None, None


def _keep_norms(ctx, inputs, output) -> None:
    ctx.save_for_backward(*inputs, output)


@first_order
def _of_norms(ctx, saved, d_norms):
    return _key_norms_backward_operator(*saved, d_norms, None), None


_key_norms_operator.register_autograd(_of_norms, setup_context=_keep_norms)


def _vmap(operator: Callable, info: Any, in_dims: Sequence, *arguments: Any):
    return in_one_batch(operator, info.batch_size, in_dims, arguments)


for _operator in (
    _prefix_sums_operator,
    _argmax_operator,
    _key_norms_operator,
    _key_norms_backward_operator,
):
    _operator.register_vmap(functools.partial(_vmap, _operator))
