"""Context parallel attention by all-gather: every row meets all of its keys in one call, so nothing is merged.

Keys and values are gathered in the forward, some heads at a time, and again in the backward, so that only this rank's
part is kept in between. Gradients of keys and values are summed over ranks in fp32.

Source: Llama Team 2024, arXiv:2407.21783, section 3.3.2.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import Function

from ..core.autograd import first_order
from ..core.call import AttentionCall, ForwardResult, Gradients, Needs
from ..core.visibility import Visibility
from ..ops.attend import backward_pass, forward_pass
from . import collectives
from .sequence import Piece, Settings, SharedSequence, add_part


def attention(call: AttentionCall, settings: Settings) -> ForwardResult:
    """Attend to the keys of all ranks; call.k and call.v are this rank's, call.logits' vectors of keys are of all."""
    results = _Attend.apply(*call.tensors, settings.sequence.visibility.key_ranges, settings)
    return ForwardResult(*results[: 4 if settings.aux else 2])


def _pieces(sequence: SharedSequence, heads: _Heads) -> list[Piece]:
    """Chunk by chunk, so that keys behind a causal chunk are left out; all at once where rows attend to any key."""
    split, whole = sequence.split, sequence.whole
    n = sequence.visibility.q_len // split.chunks_per_rank
    reach = whole.left if whole.sequences is None and whole.left is not None else sequence.length
    spans = [(i * n, (i + 1) * n, max(0, chunk * n - reach), (chunk + 1) * n) for i, chunk in enumerate(split.chunks())]
    if not sequence.ends_at_own:
        spans = [(0, sequence.visibility.q_len, 0, sequence.length)]
    return [Piece(slice(a, b), slice(c, d), heads.of_rows, heads.of_keys) for a, b, c, d in spans]


def _visible(q: Tensor, k: Tensor, ranges: Tensor | None, piece: Piece, sequence: SharedSequence) -> Visibility:
    if ranges is None:
        return Visibility.of(q, k)
    if sequence.ends_at_own and sequence.whole.sequences is None:  # the span ends at the last row's position
        return Visibility.of(q, k, window=(sequence.whole.left, 0))
    own = (ranges[:, piece.rows] - piece.keys.start).clamp(0, k.shape[2])
    return Visibility.of(q, k, key_ranges=own.contiguous())


class _Heads(NamedTuple):
    """Some heads of all tensors of a call, and the keys and values of the whole sequence: [B, heads, S, D]."""

    of_rows: slice
    of_keys: slice
    keys: Tensor
    values: Tensor


def _heads(tensors: Sequence[Any], settings: Settings) -> Iterator[_Heads]:
    q, k, v, *_ = tensors
    split, group = settings.sequence.split, q.shape[1] // k.shape[1]
    for first in range(0, k.shape[1], settings.heads):
        own = slice(first, min(first + settings.heads, k.shape[1]))
        keys = collectives.gathered(k[:, own].to(v.dtype), split, 2).to(k.dtype)
        values = collectives.gathered(v[:, own], split, 2)
        yield _Heads(slice(own.start * group, own.stop * group), own, keys, values)


def _call(
    tensors: Sequence[Tensor | None], ranges: Tensor | None, heads: _Heads, piece: Piece, settings: Settings
) -> AttentionCall:
    own, logits = piece.cut(tensors, settings)
    keys, values = heads.keys[:, :, piece.keys], heads.values[:, :, piece.keys]
    visible = _visible(own, keys, ranges, piece, settings.sequence)
    return AttentionCall(own, keys, values, visible, logits, aux=settings.aux, backend=settings.backend)


class _Attend(Function):
    @staticmethod
    def forward(ctx, q, k, v, query_scale, key_scale, key_bias, sinks, bias, relative_bias, ranges, settings: Settings):
        tensors = (q, k, v, query_scale, key_scale, key_bias, sinks, bias, relative_bias)
        columns = []
        for heads in _heads(tensors, settings):
            parts = [
                forward_pass(_call(tensors, ranges, heads, piece, settings), settings.keep_rounding)
                for piece in _pieces(settings.sequence, heads)
            ]
            columns.append([_joined(x, 2) for x in zip(*parts, strict=True)])
        out, lse, max_logit, entropy, rounding = (_joined(x, 1) for x in zip(*columns, strict=True))
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(max_logit, entropy, rounding)
        ctx.save_for_backward(*tensors, ranges, out, lse, rounding)
        ctx.settings = settings
        return out, lse, max_logit, entropy, rounding

    @staticmethod
    @first_order
    def backward(ctx, saved, d_out, d_lse, *none):
        *tensors, ranges, out, lse, rounding = saved
        settings: Settings = ctx.settings
        rounding = rounding if settings.keep_rounding else None
        needs = Needs(*ctx.needs_input_grad[: len(Needs._fields)])
        sums = Gradients(*(x.new_zeros(x.shape) if need else None for x, need in zip(tensors, needs, strict=True)))
        for heads in _heads(tensors, settings):
            of_keys = _zeros(heads.keys, needs.k, settings), _zeros(heads.values, needs.v, settings)
            for piece in _pieces(settings.sequence, heads):
                rows: Any = piece.indices.q
                call = _call(tensors, ranges, heads, piece, settings)
                results = out[rows], lse[rows], None if rounding is None else rounding[rows]
                d_own, d_own_lse = (None if d is None else d[rows] for d in (d_out, d_lse))
                got = backward_pass(call, results, d_own, d_own_lse, needs)
                piece.add(sums, got)
                for total, part in zip(of_keys, (got.k, got.v), strict=True):
                    add_part(total, (..., piece.keys, slice(None)), part)
            for total, whole in ((sums.k, of_keys[0]), (sums.v, of_keys[1])):
                if total is not None and whole is not None:
                    total[:, heads.of_keys] = collectives.scattered(whole, settings.sequence.split, 2).to(total.dtype)
        return (*sums, None, None)


def _zeros(x: Tensor, need: bool, settings: Settings) -> Tensor | None:
    """Zeros for the gradient of all keys or values, in the dtype in which ranks add theirs."""
    return x.new_zeros(x.shape, dtype=torch.promote_types(settings.reduce_dtype, x.dtype)) if need else None


def _joined(parts: Sequence[Tensor], dim: int) -> Tensor:
    if len(parts) == 1 or parts[0].dim() == 1:  # of size 0: not asked for
        return parts[0]
    return torch.cat(list(parts), dim)
