"""The statistics of keys by kernels, with gradients, as an autograd function and operators."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import Function

from ..backends import kernels, kernels_take
from ..core.autograd import apply, differentiates_again, is_transformed, needs_graph, runs_eagerly, save
from ..core.call import AttentionCall
from ..core.norms import gradient_of_norms, tangent_of_norms
from ..core.statistics import Statistics
from .operators import in_one_batch, operator


def _operator_of(name: str, arguments: str, result: str, empty: Callable[..., Tensor]) -> Any:
    """A pass of the "triton" backend, under its name there, as an operator. empty: its result without values."""

    def run(*given: Tensor | None) -> Tensor:
        return getattr(kernels(), name)(*given)

    made = operator(name, arguments, f"Tensor {result}")(run)
    made.register_fake(empty)
    made.register_vmap(lambda info, dims, *given: in_one_batch(made, info.batch_size, dims, given))
    return made


_prefix_sums_operator = _operator_of(
    "prefix_sums",
    "Tensor x, Tensor? restarts",
    "sums",
    lambda x, _: x.new_empty((*x.shape[:-1], x.shape[-1] + 1), dtype=torch.float64),
)
_argmax_operator = _operator_of(
    "argmax_over_ranges",
    "Tensor x, Tensor lo, Tensor hi",
    "keys",
    lambda x, lo, hi: lo.new_empty((*x.shape[:-1], lo.shape[-1])),
)
_key_norms_operator = _operator_of(
    "key_norms",
    "Tensor k, Tensor? seen",
    "norms",
    lambda k, seen: k.new_empty(k.shape[:3], dtype=torch.float32),
)
_key_norms_backward_operator = _operator_of(
    "key_norms_backward",
    "Tensor k, Tensor? seen, Tensor norms, Tensor d_norms, Tensor? added",
    "d_k",
    lambda k, *_: k.new_empty(k.shape),
)


def _prefix_sums(x: Tensor, restarts: Tensor | None) -> Tensor:
    """`ranges.prefix_sum` of x [B, H, n]: one launch instead of dozens on a GPU."""
    return (kernels().prefix_sums if runs_eagerly(x, restarts) else _prefix_sums_operator)(x, restarts)


def _argmax_over_ranges(x: Tensor, lo: Tensor, hi: Tensor) -> Tensor:
    """`ranges.argmax_over_ranges`: one launch instead of a dozen a power of two."""
    return (kernels().argmax_over_ranges if runs_eagerly(x, lo, hi) else _argmax_operator)(x, lo, hi)


def _key_norms(k: Tensor, seen: Tensor | None) -> Tensor:
    return kernels().key_norms(k, seen) if runs_eagerly(k, seen) else _key_norms_operator(k, seen)


def launches(x: Tensor, *others: Tensor | None) -> bool:
    """True where "auto" launches kernels on x [B, H, S, D] and others, with no operator between."""
    return kernels_take(x) and runs_eagerly(x, *others)


class KernelStatistics(Statistics):
    """Statistics whose norms, prefix sums and maxima come from kernels of the "triton" backend.

    Norms take one pass over keys or queries, where torch's operators on a GPU take several over copies in fp32.
    """

    _scan = staticmethod(_prefix_sums)
    _argmax = staticmethod(_argmax_over_ranges)

    def _norms(self) -> Tensor:
        visible = self.visibility
        if visible.attends_to_every_key:
            return self._norms_of(self.k, None)
        if visible.invariant or not runs_eagerly(visible.key_lengths, visible.key_ranges):
            return super()._norms()
        return self._norms_of(self.k, kernels().seen_keys(visible))

    def _norms_of(self, x: Tensor, seen: Tensor | None) -> Tensor:
        if not (needs_graph(x) or is_transformed()):
            return _key_norms(x, seen)
        norms, copy = apply(_Norms, x, seen)
        self.in_fp32.append((x, copy))
        return norms

    def widened(self, call: AttentionCall) -> AttentionCall:
        q, k = call.q, call.k
        for x, copy in self.in_fp32:
            q, k = copy if x is call.q else q, copy if x is call.k else k
        _, _, *rest = call  # torch 2.8 traces no slice
        return AttentionCall(q, k, *rest)  # pyright: ignore[reportArgumentType]


class _Norms(Function):
    """Norms of x [B, H, S, D], fp32 [B, H, S], and x in fp32: gradients of both are added, and rounded once."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x, seen):
        return _key_norms(x, seen), x.view_as(x) if x.dtype == torch.float32 else x.float()

    @staticmethod
    def setup_context(ctx, inputs, output) -> None:
        ctx.set_materialize_grads(False)
        save(ctx, *inputs, output[0])

    @staticmethod
    def backward(ctx, d_norms, d_copy):
        x, seen, norms = saved = ctx.saved_tensors
        if d_norms is None:
            return (None if d_copy is None else d_copy.to(x.dtype)), None
        if differentiates_again():
            d_x = gradient_of_norms(x, norms, d_norms)
            return (d_x if d_copy is None else d_x + d_copy).to(x.dtype), None
        run = kernels().key_norms_backward if runs_eagerly(*saved, d_norms, d_copy) else _key_norms_backward_operator
        return run(x, seen, norms, d_norms, d_copy), None

    @staticmethod
    def tangent(ctx, of_x, _):
        x, _, norms = ctx.saved_tensors
        return tangent_of_norms(x, norms, of_x), of_x.float()


_key_norms_operator.register_autograd(
    lambda ctx, d_norms: _Norms.backward(ctx, d_norms, None),
    setup_context=lambda ctx, inputs, output: _Norms.setup_context(ctx, inputs, (output,)),
)
