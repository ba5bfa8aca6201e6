"""Attention over the keys of all ranks, piece by piece: what gathering and the ring share."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple, TypeAlias

import torch
from torch import Tensor
from torch.autograd.function import Function

from ..core.autograd import first_order
from ..core.call import AttentionCall, ForwardResult, RowGradients
from ..core.terms import AXES, SINKS, Gradients, Needs
from ..core.visibility import Visibility
from ..ops.passes import backward_pass, forward_pass
from .sequence import SharedCall

ALL = slice(None)
ALL_KEYS = (None, None)


class Piece(NamedTuple):
    """Rows of this rank and keys that it holds, for some heads, which one call computes.

    keys        among those held; `vectors` are the same keys in the vectors of keys
    first       the position in the sequence of the first key
    window      of the rows among the keys, where sizes tell it; None: by the ranges of the rows
    has_sinks   True in one piece of each row: gradients of sinks count once
    """

    rows: slice
    keys: slice
    vectors: slice
    first: int
    window: tuple[int | None, int | None] | None
    has_sinks: bool = True
    q_heads: slice = ALL
    kv_heads: slice = ALL

    @property
    def indices(self) -> Gradients:
        """Indices of the piece in the tensors of a call, but in k and v, of which a part is held."""
        of = {"Hq": self.q_heads, "Sq": self.rows, "Hkv": self.kv_heads, "Sk": self.vectors}
        found = {name: tuple(of.get(axis, ALL) for axis in axes) for name, axes in AXES.items()}
        return Gradients(**found | {"k": None, "v": None})

    def visible(self, q: Tensor, k: Tensor, ranges: Tensor | None) -> Visibility:
        """The keys that the rows attend to; ranges are those of all of this rank's rows in the sequence."""
        if self.window is not None:
            return Visibility.of(q, k, window=self.window)
        assert ranges is not None
        ranges = (ranges[:, self.rows] - self.first).clamp(0, k.shape[2])
        return Visibility.of(q, k, key_ranges=ranges.contiguous())


Result: TypeAlias = tuple[Piece, tuple[Tensor, ...]]  # the latter as `forward_pass` returns them


@dataclass(eq=False)
class Held:
    """Keys and values that this rank holds for a while, and the pieces of them that its rows attend to.

    gradients   the sums of those of keys and values over the pieces, None where not asked for
    """

    keys: Tensor
    values: Tensor
    pieces: list[Piece]
    gradients: list[Tensor | None]


@dataclass(frozen=True, eq=False)
class Schedule:
    """The keys and values that this rank holds, one after the other."""

    shared: SharedCall
    is_part: ClassVar[bool]  # rows attend to keys of several pieces, whose vectors of keys stand part by part

    def held(self, k: Tensor, v: Tensor, sums: Gradients | None = None) -> Iterator[Held]:
        """Yield what is held; in a backward add its gradients, once the pieces have theirs, to sums.k and sums.v."""
        raise NotImplementedError

    def rows(self, q: Tensor, v: Tensor, sinks: Tensor | None, results: Iterable[Result]) -> tuple[Tensor, ...]:
        """The results of all rows, as of `forward_pass`, from those of pieces."""
        raise NotImplementedError

    def zeros(self, x: Tensor, v: Tensor) -> Tensor:
        """Zeros for the gradient of keys or values x, in the dtype in which ranks add theirs; keys may be in fp32."""
        return x.new_zeros(x.shape, dtype=torch.promote_types(self.shared.reduce_dtype, v.dtype))

    def call(
        self, tensors: Sequence[Any], ranges: Tensor | None, held: Held, piece: Piece, sinks: bool
    ) -> AttentionCall:
        shared = self.shared
        named = zip(AXES, tensors, piece.indices, strict=True)
        of = {name: x[index] for name, x, index in named if x is not None and index is not None}
        q = of.pop("q")
        k, v = held.keys[:, :, piece.keys].to(q.dtype), held.values[:, :, piece.keys]
        terms = shared.numbers._replace(**{name: x for name, x in of.items() if sinks or name not in SINKS})
        visible, aux, backend = piece.visible(q, k, ranges), shared.aux, shared.backend
        return AttentionCall(q, k, v, visible, terms, is_part=self.is_part, aux=aux, backend=backend)


def attend(call: AttentionCall, schedule: Schedule) -> ForwardResult:
    """Attend to the keys of all ranks; call.k and call.v are this rank's, call.terms' vectors of keys are of all."""
    shared = schedule.shared
    results = _Attend.apply(*call.tensors(), shared.sequence.visibility.key_ranges, schedule)
    return ForwardResult(*results[: 4 if shared.aux else 2])


@dataclass(eq=False)
class _Largest:
    """The largest logits of rows over the pieces so far, and the first key of the lowest piece that has each.

    logit    [B, Hq, Sq]
    first    int64 [B, Hq, Sq], `Piece.first`; -1 in rows without keys
    """

    logit: Tensor
    first: Tensor

    @classmethod
    def of(cls, q: Tensor) -> _Largest:
        dtype = torch.promote_types(q.dtype, torch.float32)
        logit = q.new_full(q.shape[:3], -torch.inf, dtype=dtype)
        return cls(logit, torch.full_like(logit, -1, dtype=torch.int64))

    def add(self, piece: Piece, logit: Tensor) -> None:
        at = (ALL, piece.q_heads, piece.rows)
        of_rows, first = self.logit[at], self.first[at]
        is_next = (logit > of_rows) | ((logit == of_rows) & (first > piece.first))
        self.logit[at] = torch.where(is_next, logit, of_rows)
        self.first[at] = torch.where(is_next, piece.first, first)


class _Attend(Function):
    @staticmethod
    def forward(ctx, *inputs):
        *tensors, ranges, schedule = inputs
        q, k, v, sinks = (tensors[number] for number in _FOR_ROWS)
        by_piece, keep_rounding = _by_piece(tensors, schedule), schedule.shared.keep_rounding
        largest = _Largest.of(q) if schedule.shared.aux else None

        def results() -> Iterator[Result]:
            for held in schedule.held(k, v):
                for piece in held.pieces:
                    call = schedule.call(by_piece, ranges, held, piece, sinks=not schedule.is_part)
                    found = forward_pass(call, keep_rounding or (schedule.is_part and v.dtype.itemsize == 2))
                    if largest is not None:
                        largest.add(piece, found[2])
                    yield piece, found

        out, lse, max_logit, entropy, rounding = schedule.rows(q, v, sinks, results())
        ctx.set_materialize_grads(False)
        of_aux = (None, None) if largest is None else (entropy, largest.first)
        if largest is None:
            ctx.mark_non_differentiable(max_logit, entropy)
        ctx.save_for_backward(*tensors, ranges, out, lse, rounding if keep_rounding else None, *of_aux)
        ctx.schedule = schedule
        return out, lse, max_logit, entropy

    @staticmethod
    @first_order("attention over several ranks")
    def backward(ctx, saved, d_out, d_lse, d_max_logit, d_entropy):
        *tensors, ranges, out, lse, rounding, entropies, first = saved
        entropies = None if d_entropy is None else entropies
        schedule: Schedule = ctx.schedule
        needs = Needs(*ctx.needs_input_grad[: len(Needs._fields)])
        sums = Gradients(*(x.new_zeros(x.shape) if need else None for x, need in zip(tensors, needs, strict=True)))
        by_piece = _by_piece(tensors, schedule)
        for held in schedule.held(tensors[1], tensors[2], sums):
            for piece in held.pieces:
                indices, keys, at = piece.indices, (..., piece.keys, ALL), (ALL, piece.q_heads, piece.rows)
                of_results = out, lse, rounding, d_out, d_lse, d_max_logit, d_entropy, entropies
                of_rows: list[Any] = [None if x is None else x[at] for x in of_results]
                call = schedule.call(by_piece, ranges, held, piece, sinks=True)
                d_rows = RowGradients(*of_rows[4:])
                if d_rows.max_logit is not None:
                    d_rows = d_rows._replace(max_logit=d_rows.max_logit.masked_fill(first[at] != piece.first, 0))
                got = backward_pass(call, (of_rows[0], of_rows[1], of_rows[2]), of_rows[3], d_rows, needs)
                if not piece.has_sinks:
                    got = got._replace(**dict.fromkeys(SINKS))
                totals, indices_of = (*sums, *held.gradients), (*indices, keys, keys)
                for total, index, gradient in zip(totals, indices_of, (*got, got.k, got.v), strict=True):
                    if total is not None and index is not None and gradient is not None:
                        total[index] += gradient
        return (*_by_piece(sums, schedule, back=True), None, None)


def _by_piece(tensors: Sequence[Tensor | None], schedule: Schedule, back: bool = False) -> tuple[Tensor | None, ...]:
    """The tensors of a call with the vectors of keys as `Piece.vectors` counts them, or back in their order."""
    if not schedule.is_part:
        return tuple(tensors)
    split = schedule.shared.sequence.split
    order = split.in_order if back else split.by_rank
    moved = ("Sk" in axes and name not in ("k", "v") for name, axes in AXES.items())
    return tuple(order(x, -1) if moves and x is not None else x for x, moves in zip(tensors, moved, strict=True))


_FOR_ROWS = [list(AXES).index(name) for name in ("q", "k", "v", *SINKS)]
