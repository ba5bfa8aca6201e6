"""`tritonattn::key_lengths`: the "triton" backend's one pass over the keys, and its differentiation."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import Function

from ..autograd import first_order, runs_eagerly
from ..statistics import Statistics
from .mapping import in_one_batch
from .names import qualified


class KernelStatistics(Statistics):
    """Statistics whose lengths and prefix sums come from one fused pass over k in the "triton" backend."""

    def _lengths(self) -> Tensor:
        seen = None if self.visibility.is_full else self.visibility.seen_keys()
        lengths, self._length_prefix, self._square_prefix = _KeyLengths.apply(self.k, seen)
        return lengths

    def _length_sum(self) -> Tensor:
        if self.visibility.mask is not None:
            return super()._length_sum()
        lengths = self.lengths
        return self.visibility.sum_from_prefix(lengths, self._length_prefix).to(lengths.dtype)

    def _length_square_sum(self) -> Tensor:
        if self.visibility.mask is not None:
            return super()._length_square_sum()
        squares = self.lengths.double().square()
        return self.visibility.sum_from_prefix(squares, self._square_prefix)


def _kernels() -> Any:
    from .. import triton_backend

    return triton_backend


@torch.library.custom_op(
    qualified("key_lengths"), mutates_args=(), schema="(Tensor k, Tensor? seen) -> (Tensor, Tensor, Tensor)"
)
def _key_lengths_operator(k, seen):
    return _kernels().key_statistics(k, seen)


@_key_lengths_operator.register_fake
def _(k, seen):
    prefix = (*k.shape[:2], k.shape[2] + 1)
    lengths = k.new_empty(k.shape[:3], dtype=torch.float32)
    return lengths, k.new_empty(prefix, dtype=torch.float64), k.new_empty(prefix, dtype=torch.float64)


def _key_lengths_backward(k: Tensor, seen: Tensor | None, lengths: Tensor, d_lengths: Tensor) -> Tensor:
    return _kernels().key_statistics_backward(k, seen, lengths, d_lengths)


@torch.library.custom_op(
    qualified("key_lengths_backward"),
    mutates_args=(),
    schema="(Tensor k, Tensor? seen, Tensor lengths, Tensor d_lengths) -> Tensor",
)
def _key_lengths_backward_operator(k, seen, lengths, d_lengths):
    return _key_lengths_backward(k, seen, lengths, d_lengths)


@_key_lengths_backward_operator.register_fake
def _(k, seen, lengths, d_lengths):
    return k.new_empty(k.shape)


class _KeyLengths(Function):
    """lengths [B, Hkv, Sk] fp32, and the fp64 [B, Hkv, Sk + 1] prefix sums of them and of their squares."""

    generate_vmap_rule = True

    @staticmethod
    def forward(k, seen):
        if runs_eagerly(k, seen):
            return _kernels().key_statistics(k, seen)
        return _key_lengths_operator(k, seen)

    @staticmethod
    def setup_context(ctx, inputs, output) -> None:
        lengths, *prefixes = output
        ctx.mark_non_differentiable(*prefixes)
        ctx.save_for_backward(*inputs, lengths)

    @staticmethod
    @first_order
    def backward(ctx, saved, d_lengths, *d_prefixes):
        k, seen, lengths = saved
        eager = runs_eagerly(*saved, d_lengths)
        run = _key_lengths_backward if eager else _key_lengths_backward_operator
        return run(k, seen, lengths, d_lengths), None


_key_lengths_operator.register_autograd(_KeyLengths.backward, setup_context=_KeyLengths.setup_context)


def _vmap(operator: Callable, info: Any, in_dims: Sequence, *arguments: Any):
    return in_one_batch(operator, info.batch_size, in_dims, arguments)


_key_lengths_operator.register_vmap(partial(_vmap, _key_lengths_operator))
_key_lengths_backward_operator.register_vmap(partial(_vmap, _key_lengths_backward_operator))
