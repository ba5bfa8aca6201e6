"""Context parallel attention in a ring: parts of keys and values go round, and each rank merges what it sees of them.

At step s a rank holds the part of rank r - s, and passes it on while it computes. Rows are merged by their lse. In the
backward the parts go round again, each with its gradient, to which every rank adds; probabilities come from the lse of
all keys and delta from the output of all keys, so that a part's gradients are those of the whole. No rank ever holds
more than two parts.

Source: Liu et al. 2023, arXiv:2310.01889; merging of parts: Milakov & Gimelshein 2018, arXiv:1805.02867.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import Function

from ..core.autograd import first_order
from ..core.call import AttentionCall, ForwardResult, Gradients, Logits, Needs
from ..core.rounding import before_rounding, lost_in_rounding
from ..core.visibility import Visibility
from ..ops.attend import backward_pass, forward_pass
from . import collectives
from .sequence import Settings, SharedSequence, add_part, share_beside_sinks


def attention(call: AttentionCall, settings: Settings) -> ForwardResult:
    """Attend to the keys of all ranks; call.k and call.v are this rank's, call.logits' vectors of keys are of all."""
    results = _Attend.apply(*call.tensors, settings.sequence.visibility.key_ranges, settings)
    return ForwardResult(*results[: 4 if settings.aux else 2])


class Pair(NamedTuple):
    """Rows of this rank, and keys of a part, which begin at key `first` of the sequence; hides: some are not seen."""

    rows: slice
    keys: slice
    first: int
    is_diagonal: bool
    hides: bool


def pairs_of(sequence: SharedSequence, source: int) -> list[Pair]:
    """The chunks of rows, and the chunks of the part of rank `source`, that sizes alone do not rule out."""
    split, whole = sequence.split, sequence.whole
    n = sequence.visibility.q_len // split.chunks_per_rank
    left = None if whole.sequences is not None else whole.left
    found = []
    for i, row in enumerate(split.chunks()):
        for j, key in enumerate(split.chunks(source)):
            behind = sequence.ends_at_own and key > row
            if behind or (left is not None and row * n - left >= (key + 1) * n):
                continue
            is_causal = sequence.ends_at_own and whole.left is None and whole.sequences is None
            hides = not (whole.is_full or (is_causal and key < row))
            rows, keys = (slice(at * n, (at + 1) * n) for at in (i, j))
            found.append(Pair(rows, keys, key * n, is_causal and key == row, hides))
    return found


def _call(
    tensors: Sequence[Any], part: Sequence[Tensor], ranges: Tensor | None, pair: Pair, settings: Settings, sinks: bool
) -> AttentionCall:
    q, _, _, query_scale, key_scale, key_bias, of_heads = tensors
    own, n = q[:, :, pair.rows], pair.keys.stop - pair.keys.start
    keys, values = part[0][:, :, pair.keys].to(q.dtype), part[1][:, :, pair.keys]
    if not pair.hides:
        visible = Visibility.of(own, keys)
    elif pair.is_diagonal:
        visible = Visibility.of(own, keys, causal=True)
    else:
        assert ranges is not None
        seen = (ranges[:, pair.rows] - pair.first).clamp(0, n)
        visible = Visibility.of(own, keys, key_ranges=seen.contiguous())
    logits = Logits(
        settings.scale,
        None if query_scale is None else query_scale[:, :, pair.rows],
        None if key_scale is None else key_scale[..., pair.first : pair.first + n],
        None if key_bias is None else key_bias[..., pair.first : pair.first + n],
        settings.softcap,
        of_heads if sinks else None,
    )
    return AttentionCall(own, keys, values, visible, logits, is_part=True)


def _round(part: list[Tensor], settings: Settings) -> Iterator[tuple[int, list[Tensor]]]:
    """(rank whose part it is, part) of every step; the next one is on its way meanwhile."""
    split = settings.sequence.split
    for step in range(split.size):
        pending = collectives.pass_on(part, split) if step < split.size - 1 else None
        yield (split.rank - step) % split.size, part
        if pending is not None:
            part = pending.wait()


class _Merged(NamedTuple):
    """Rows over the keys seen so far: out [B, Hq, S / P, Dv] and lse, max_logit, mean_logit [B, Hq, S / P], wide."""

    out: Tensor
    lse: Tensor
    max_logit: Tensor
    mean_logit: Tensor

    @classmethod
    def of_nothing(cls, q: Tensor, v: Tensor) -> _Merged:
        rows, dtype = q.shape[:3], torch.promote_types(q.dtype, torch.float32)
        lse = q.new_full(rows, -torch.inf, dtype=dtype)
        return cls(q.new_zeros((*rows, v.shape[3]), dtype=dtype), lse, lse.clone(), torch.zeros_like(lse))

    def add(self, rows: slice, results: tuple[Tensor, ...], aux: bool) -> None:
        """Merge results of `forward_pass` into some rows."""
        out, lse, max_logit, entropy, rounding = results
        before = self.lse[:, :, rows]
        total = torch.logaddexp(before, lse)
        shift = total.masked_fill(total == -torch.inf, 0)
        kept, new = (before - shift).exp(), (lse - shift).exp()
        wide = before_rounding(out, rounding) if rounding.numel() else out.to(self.out.dtype)
        self.out[:, :, rows] = self.out[:, :, rows] * kept[..., None] + wide * new[..., None]
        if aux:
            self.max_logit[:, :, rows] = torch.maximum(self.max_logit[:, :, rows], max_logit)
            mean = (lse - entropy).masked_fill(lse == -torch.inf, 0)
            self.mean_logit[:, :, rows] = self.mean_logit[:, :, rows] * kept + mean * new
        self.lse[:, :, rows] = total


class _Attend(Function):
    @staticmethod
    def forward(ctx, q, k, v, query_scale, key_scale, key_bias, sinks, ranges, settings: Settings):
        tensors = (q, k, v, query_scale, key_scale, key_bias, sinks)
        merged = _Merged.of_nothing(q, v)
        keep_rounding = v.dtype.itemsize == 2
        for source, part in _round([k.to(v.dtype), v], settings):
            for pair in pairs_of(settings.sequence, source):
                call = _call(tensors, part, ranges, pair, settings, sinks=False)
                merged.add(pair.rows, forward_pass(call, settings.backend, settings.aux, keep_rounding), settings.aux)
        wide, lse = merged.out, merged.lse
        if sinks is not None:
            wide = wide * share_beside_sinks(lse, sinks)[..., None]
        out = wide.to(v.dtype)
        rounding = lost_in_rounding(wide, out) if settings.keep_rounding else None
        entropy = (lse - merged.mean_logit).masked_fill(lse == -torch.inf, 0).clamp(min=0)
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(merged.max_logit, entropy)
        ctx.save_for_backward(*tensors, ranges, out, lse, rounding)
        ctx.settings = settings
        return out, lse, merged.max_logit, entropy

    @staticmethod
    @first_order
    def backward(ctx, saved, d_out, d_lse, *none):
        *tensors, ranges, out, lse, rounding = saved
        settings: Settings = ctx.settings
        needs = Needs(*ctx.needs_input_grad[: len(Needs._fields)])
        _, k, v, *_ = tensors
        sums = Gradients(*(x.new_zeros(x.shape) if need else None for x, need in zip(tensors, needs, strict=True)))
        moving: collectives.Pending | None = None
        for source, part in _round([k.to(v.dtype), v], settings):
            of_part = [x.new_zeros(x.shape, dtype=torch.promote_types(settings.reduce_dtype, x.dtype)) for x in part]
            for pair in pairs_of(settings.sequence, source):
                rows, keys = (..., pair.rows, slice(None)), (..., pair.keys, slice(None))
                call = _call(tensors, part, ranges, pair, settings, sinks=True)
                results = out[rows], lse[:, :, pair.rows], None if rounding is None else rounding[rows]
                of_rows = None if d_out is None else d_out[rows], None if d_lse is None else d_lse[:, :, pair.rows]
                got = backward_pass(call, settings.backend, results, *of_rows, needs)
                add_part(sums.q, rows, got.q)
                add_part(of_part[0], keys, got.k)
                add_part(of_part[1], keys, got.v)
                add_part(sums.query_scale, (..., pair.rows), got.query_scale)
                span = slice(pair.first, pair.first + pair.keys.stop - pair.keys.start)
                add_part(sums.key_scale, (..., span), got.key_scale)
                add_part(sums.key_bias, (..., span), got.key_bias)
                if pair.first == settings.sequence.first_of(pair.rows):  # once a row
                    add_part(sums.sinks, ..., got.sinks)
            if moving is not None:
                of_part = [own + theirs for own, theirs in zip(of_part, moving.wait(), strict=True)]
            moving = collectives.pass_on(of_part, settings.sequence.split)
        assert moving is not None
        home = moving.wait()
        d_k, d_v = (None if total is None else own.to(total.dtype) for total, own in zip(sums[1:3], home, strict=True))
        return sums.q, d_k, d_v, *sums[3:], None, None
