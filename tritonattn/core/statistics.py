"""Key statistics: sums and maxima of key lengths over the keys visible to each row.

    length[j]            = ||k[j]||
    length_sum[i]        = sum of length[j]      over the keys j visible to row i
    length_square_sum[i] = sum of length[j]^2    likewise
    length_max[i]        = max of length[j]      likewise

Everything here is differentiable with respect to k and costs O(S) memory beside k. A kernel that computes the
same quantities takes the place of this class by overriding its underscore methods.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from .autograd import apply, runs_eagerly
from .call import AttentionCall
from .invariance import halving_sum
from .ranges import argmax_over_ranges, prefix_sum
from .visibility import Visibility


@dataclass(eq=False)
class Statistics:
    """Lazily computed statistics of the keys k, or k(), [B, Hkv, Sk, D] that each row of `visibility` sees.

    lengths             [B, Hkv, Sk]   fp32; 0 for a key that no row sees, whatever it holds
    length_sum          [B, Hkv, Sq]   fp32
    length_square_sum   [B, Hkv, Sq]   fp64, since the square of an fp32 length need not fit fp32
    length_max          [B, Hkv, Sq]   fp32; the lowest key that attains the maximum takes its gradient

    Row statistics are [B, Hq, Sq] where the query heads of a group see different keys
    (`visibility.per_query_head`), and 0 for a row without keys. k in fp64 gives fp64 everywhere. Each is
    computed at its first use and kept.
    """

    _scan = staticmethod(prefix_sum)
    _argmax = staticmethod(argmax_over_ranges)

    _source: Tensor | Callable[[], Tensor]
    visibility: Visibility
    _known: dict[str, Tensor] = field(default_factory=dict, init=False)
    # Tensors whose lengths have a gradient, and what takes theirs: `widened`.
    wide: list[tuple[Tensor, Tensor]] = field(default_factory=list, init=False)

    @property
    def k(self) -> Tensor:
        return self._source if isinstance(self._source, Tensor) else self._once("k", self._source)

    @property
    def lengths(self) -> Tensor:
        return self._once("lengths", self._lengths)

    @property
    def length_sum(self) -> Tensor:
        return self._once("length_sum", self._length_sum)

    @property
    def length_square_sum(self) -> Tensor:
        return self._once("length_square_sum", self._length_square_sum)

    @property
    def length_max(self) -> Tensor:
        return self._once("length_max", self._length_max)

    def query_lengths(self, q: Tensor) -> Tensor:
        """Euclidean lengths of the queries q [B, Hq, Sq, D]: [B, Hq, Sq], fp32 (fp64 for fp64 q), differentiable.

        0 for a row without keys, whatever it holds.
        """
        return self._lengths_of(q, None if self.visibility.every_row_sees else self.visibility.seeing_rows())

    def _lengths_of(self, x: Tensor, seen: Tensor | None) -> Tensor:
        return key_lengths_of(x, seen, self.visibility.invariant)

    def widened(self, call: AttentionCall) -> AttentionCall:
        """The call with gradients in fp32 for q and k, where gradients of their lengths are added to them."""
        return call

    def _once(self, name: str, compute: Callable[[], Tensor]) -> Tensor:
        # Not functools.cached_property: torch.compile cannot trace its lock (Python < 3.12).
        if name not in self._known:
            self._known[name] = compute()
        return self._known[name]

    def _lengths(self) -> Tensor:
        return self._lengths_of(self.k, self._counted_keys())

    def _counted_keys(self) -> Tensor | None:
        return self.visibility.counted_keys(lambda: key_lengths_of(self.k.detach(), None, self.visibility.invariant))

    def _length_sum(self) -> Tensor:
        return self.visibility.sum(self.lengths, self._scan, self.lengths.dtype)

    def _length_square_sum(self) -> Tensor:
        return self.visibility.sum(self.lengths.double().square(), self._scan)

    def _length_max(self) -> Tensor:
        return self.visibility.max(self.lengths, self._scan, self._argmax)


class DoubleStatistics(Statistics):
    """Statistics in fp64, for a factor that enters another: gradients towards it may leave fp32's range."""

    def __init__(self, statistics: Statistics) -> None:
        super().__init__(lambda: statistics.k, statistics.visibility)
        self._narrow = statistics

    def query_lengths(self, q: Tensor) -> Tensor:
        return self._narrow.query_lengths(q).double()

    def _lengths(self) -> Tensor:
        return self._narrow.lengths.double()

    def _length_sum(self) -> Tensor:
        return self._narrow.length_sum.double()

    def _length_square_sum(self) -> Tensor:
        return self._narrow.length_square_sum

    def _length_max(self) -> Tensor:
        return self._narrow.length_max.double()


def key_lengths_of(k: Tensor, seen: Tensor | None = None, invariant: bool = False) -> Tensor:
    """Euclidean lengths of k [..., D]: [...], fp32 (fp64 for fp64 k).

    seen, bool and broadcastable to [...], names the rows that count: the others have length 0 and gradient 0
    even where they hold NaN. Where a square would over- or underflow the largest component is factored out.
    The gradient of ||k|| is k / ||k||, and 0 at k = 0. invariant: a length's bits depend on its key alone.
    """
    return apply(_Length, k, seen, invariant)


class _Length(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(k: Tensor, seen: Tensor | None, invariant: bool) -> Tensor:
        is_readable = runs_eagerly(k) and k.device.type == "cpu" and k.numel() > 0
        if invariant:
            lengths = _by_pieces(lambda piece: _lengths_of(piece, _invariant_norm), k)
        else:
            lengths = _lengths_on_cpu(k) if is_readable else _lengths_of(k)
        return lengths if seen is None else torch.where(seen, lengths, 0)

    @staticmethod
    def setup_context(ctx, inputs, output) -> None:
        ctx.save_for_backward(inputs[0], output)

    @staticmethod
    def backward(ctx, g: Tensor):
        k, lengths = ctx.saved_tensors
        counted = lengths > 0
        direction = k / torch.where(counted, lengths, 1)[..., None]
        return (direction * g[..., None]).masked_fill_(~counted[..., None], 0).to(k.dtype), None, None


# Keys that are widened at a time: a widened copy of all of k would be the peak of a call's memory.
_ROWS = 1024


def _lengths_on_cpu(k: Tensor) -> Tensor:
    """Compute `_lengths_of` in one pass, and in full where the results show that a square over- or underflowed."""
    lengths = _norm(k) if k.dtype.itemsize > 2 else _by_pieces(_norm, k)
    lowest, highest = torch.aminmax(lengths)
    is_safe = _is_safe(lowest.item()) and _is_safe(highest.item())  # neither where one is NaN
    return lengths if is_safe else _by_pieces(_lengths_of, k)


def _by_pieces(lengths: Callable[[Tensor], Tensor], k: Tensor) -> Tensor:
    if not runs_eagerly(k) or k.dim() < 2 or k.shape[-2] <= _ROWS:  # a trace would bind the number of keys
        return lengths(k)
    return torch.cat([lengths(piece) for piece in k.split(_ROWS, dim=-2)], dim=-1)


def _lengths_of(k: Tensor, norm: Callable[[Tensor], Tensor] | None = None) -> Tensor:
    """Lengths of k; each key by itself decides whether its largest component is factored out."""
    norm = norm or _norm
    lengths = norm(k)
    wide = k.to(lengths.dtype)
    largest = wide.abs().amax(-1)
    largest = torch.where(largest > 0, largest, 1)
    factored = largest * norm(wide / largest[..., None])
    return torch.where(_is_safe(lengths), lengths, factored)


def _is_safe(lengths: Any) -> Any:
    """Whether a length, or each of a tensor, comes from squares that neither over- nor underflowed in fp32.

    The bounds are literals: torch.compile(dynamic=True) would make inputs of globals, which two functions cannot share.
    """
    return (lengths > 1e-15) & (lengths < 1e15)


def _invariant_norm(k: Tensor) -> Tensor:
    wide = k.to(torch.promote_types(k.dtype, torch.float32))
    return halving_sum(wide.square())[..., 0].sqrt()


def _norm(k: Tensor) -> Tensor:
    return torch.linalg.vector_norm(k, dim=-1, dtype=torch.promote_types(k.dtype, torch.float32))
