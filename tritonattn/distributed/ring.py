"""Context parallel attention in a ring: parts of keys and values go round, and each rank merges its results over them.

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
from ..core.call import AttentionCall, ForwardResult, Gradients, Needs
from ..core.rounding import before_rounding, lost_in_rounding
from ..core.visibility import Visibility
from ..ops.attend import backward_pass, forward_pass
from . import collectives
from .layout import Split
from .sequence import Piece, Settings, SharedSequence, add_part, share_with_sinks


def attention(call: AttentionCall, settings: Settings) -> ForwardResult:
    """Attend to the keys of all ranks; call.k and call.v are this rank's, call.logits' vectors of keys are of all."""
    results = _Attend.apply(*call.tensors, settings.sequence.visibility.key_ranges, settings)
    return ForwardResult(*results[: 4 if settings.aux else 2])


class Pair(NamedTuple):
    """Rows of this rank and keys of a part, one or both chunks of each: rows attend to all keys, unless it hides some.

    first   the position in the sequence of the first key
    whole   the keys among those of all ranks, part by part
    """

    rows: slice
    keys: slice
    first: int
    whole: slice
    is_diagonal: bool
    hides: bool

    @property
    def has_own_keys(self) -> bool:
        """True where the keys, of this rank's part, are also those of the rows' tokens."""
        return self.keys.start <= self.rows.start and self.rows.stop <= self.keys.stop


def pairs_of(sequence: SharedSequence, source: int) -> list[Pair]:
    """The chunks of rows, and the chunks of the part of rank `source`, that sizes alone do not rule out.

    Two chunks that rows attend to up to the end, or but for the last one's diagonal, are taken at once.
    """
    split, whole = sequence.split, sequence.whole
    length = sequence.visibility.q_len
    n = length // split.chunks_per_rank
    left = None if whole.sequences is not None else whole.left
    is_causal = sequence.ends_at_own and whole.left is None and whole.sequences is None
    found: list[Pair] = []
    for i, row in enumerate(split.chunks()):
        rows, own = slice(i * n, (i + 1) * n), []
        for j, key in enumerate(split.chunks(source)):
            behind = sequence.ends_at_own and key > row
            if behind or (left is not None and row * n - left >= (key + 1) * n):
                continue
            keys, whole_keys = (slice(start + j * n, start + (j + 1) * n) for start in (0, source * length))
            hides = not (whole.is_full or (is_causal and key < row))
            own.append(Pair(rows, keys, key * n, whole_keys, is_causal and key == row, hides))
        if len(own) == 2 and not own[0].hides and (own[1].is_diagonal or not own[1].hides):
            first, last = own
            keys, whole_keys = slice(first.keys.start, last.keys.stop), slice(first.whole.start, last.whole.stop)
            own = [last._replace(keys=keys, whole=whole_keys)]
        found += own
    if len(found) == 2 and found[0].keys == found[1].keys and not (found[0].hides or found[1].hides):
        return [found[0]._replace(rows=slice(0, length))]
    return found


def _by_part(tensors: Sequence[Any], split: Split) -> tuple[Any, ...]:
    """The tensors of a call, with the vectors of keys part by part."""
    q, k, v, query_scale, key_scale, key_bias, *rest = tensors
    of_keys = (None if x is None else split.by_rank(x, -1) for x in (key_scale, key_bias))
    return q, k, v, query_scale, *of_keys, *rest


def _call(
    tensors: Sequence[Any], part: Sequence[Tensor], ranges: Tensor | None, pair: Pair, settings: Settings, sinks: bool
) -> AttentionCall:
    own, logits = Piece(pair.rows, pair.whole).cut(tensors, settings)
    keys, values = part[0][:, :, pair.keys].to(own.dtype), part[1][:, :, pair.keys]
    if not pair.hides:
        visible = Visibility.of(own, keys)
    elif pair.is_diagonal:
        visible = Visibility.of(own, keys, causal=True)
    else:
        assert ranges is not None
        seen = (ranges[:, pair.rows] - pair.first).clamp(0, keys.shape[2])
        visible = Visibility.of(own, keys, key_ranges=seen.contiguous())
    logits = logits if sinks else logits._replace(sinks=None)
    own_options = {"aux": settings.aux, "backend": settings.backend}
    return AttentionCall(own, keys, values, visible, logits, is_part=True, **own_options)


def _round(part: list[Tensor], settings: Settings) -> Iterator[tuple[int, list[Tensor]]]:
    """(rank whose part it is, part) of every step; the next one is on its way meanwhile."""
    split = settings.sequence.split
    for step in range(split.size):
        pending = collectives.pass_on(part, split) if step < split.size - 1 else None
        yield (split.rank - step) % split.size, part
        if pending is not None:
            part = pending.wait()


class _Merged(NamedTuple):
    """Rows over the keys so far: out [B, Hq, S / P, Dv] and lse, max_logit, mean_logit [B, Hq, S / P], wide."""

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
    def forward(ctx, q, k, v, query_scale, key_scale, key_bias, sinks, bias, relative_bias, ranges, settings: Settings):
        tensors = (q, k, v, query_scale, key_scale, key_bias, sinks, bias, relative_bias)
        by_part = _by_part(tensors, settings.sequence.split)
        merged = _Merged.of_nothing(q, v)
        keep_rounding = v.dtype.itemsize == 2
        for source, part in _round([k.to(v.dtype), v], settings):
            for pair in pairs_of(settings.sequence, source):
                call = _call(by_part, part, ranges, pair, settings, sinks=False)
                merged.add(pair.rows, forward_pass(call, keep_rounding), settings.aux)
        wide, lse = merged.out, merged.lse
        if sinks is not None:
            wide = wide * share_with_sinks(lse, sinks)[..., None]
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
        split = settings.sequence.split
        needs = Needs(*ctx.needs_input_grad[: len(Needs._fields)])
        _, k, v, *_ = tensors
        by_part = _by_part(tensors, split)
        sums = Gradients(*(x.new_zeros(x.shape) if need else None for x, need in zip(tensors, needs, strict=True)))
        moving: collectives.Pending | None = None
        for source, part in _round([k.to(v.dtype), v], settings):
            of_part = [x.new_zeros(x.shape, dtype=torch.promote_types(settings.reduce_dtype, x.dtype)) for x in part]
            for pair in pairs_of(settings.sequence, source):
                rows, keys = (..., pair.rows, slice(None)), (..., pair.keys, slice(None))
                call = _call(by_part, part, ranges, pair, settings, sinks=True)
                results = out[rows], lse[:, :, pair.rows], None if rounding is None else rounding[rows]
                of_rows = None if d_out is None else d_out[rows], None if d_lse is None else d_lse[:, :, pair.rows]
                got = backward_pass(call, results, *of_rows, needs)
                add_part(of_part[0], keys, got.k)
                add_part(of_part[1], keys, got.v)
                if not (source == split.rank and pair.has_own_keys):  # sinks count once a row
                    got = got._replace(sinks=None)
                Piece(pair.rows, pair.whole).add(sums, got)
            if moving is not None:
                of_part = [own + theirs for own, theirs in zip(of_part, moving.wait(), strict=True)]
            moving = collectives.pass_on(of_part, split)
        assert moving is not None
        home = moving.wait()
        d_k, d_v = (None if total is None else own.to(total.dtype) for total, own in zip(sums[1:3], home, strict=True))
        d_key_scale, d_key_bias = (None if x is None else split.in_order(x, -1) for x in sums[4:6])
        return sums.q, d_k, d_v, sums.query_scale, d_key_scale, d_key_bias, sums.sinks, None, None, None, None
