"""Key statistics: sums and maxima of key norms over the keys visible to each row.

    norm[j]            = ||k[j]||
    norm_sum[i]        = sum of norm[j]      over the keys j visible to row i
    norm_square_sum[i] = sum of norm[j]^2    likewise
    norm_max[i]        = max of norm[j]      likewise

Everything here is differentiable with respect to k and takes O(S) memory more than k. A kernel that computes the
same quantities takes the place of this class by overriding its underscore methods.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor

from . import ranges
from .autograd import apply, runs_eagerly
from .call import AttentionCall
from .invariance import halving_sum
from .packing import PackedAxis
from .ranges import argmax_over_ranges, prefix_sum
from .visibility import Visibility

Scan = Callable[[Tensor], Tensor]
Argmax = Callable[[Tensor, Tensor, Tensor], Tensor]


class Renamed:
    """A class whose attributes had other names: these raise an AttributeError with the present ones."""

    renamed: ClassVar[dict[str, str]] = {}

    # No __getattr__: it would answer for properties that fail, and for names that a compiled scaling asks by hasattr.
    def __init_subclass__(cls) -> None:
        for earlier, present in cls.renamed.items():
            setattr(cls, earlier, _refused(earlier, present))


def _refused(earlier: str, present: str) -> property:
    def refuse(self: Any) -> Any:
        raise AttributeError(f"{type(self).__name__}: expected {present}, got {earlier}")

    return property(refuse)


@dataclass(eq=False)
class Statistics(Renamed):
    """Lazily computed statistics of the keys k, or k(), [B, Hkv, Sk, D] that each row of `visibility` attends to.

    norms             [B, Hkv, Sk]   fp32; 0 for a key that no row attends to, whatever it holds
    norm_sum          [B, Hkv, Sq]   fp32
    norm_square_sum   [B, Hkv, Sq]   fp64, since the square of an fp32 norm need not fit fp32
    norm_max          [B, Hkv, Sq]   fp32; the lowest key that attains the maximum takes its gradient

    Row statistics are [B, Hq, Sq] where the query heads of a group see different keys
    (`visibility.per_query_head`), and 0 for a row without keys. k in fp64 gives fp64 everywhere. Each is
    computed at its first use and kept.
    """

    renamed: ClassVar[dict[str, str]] = {
        "lengths": "norms",
        "length_sum": "norm_sum",
        "length_square_sum": "norm_square_sum",
        "length_max": "norm_max",
        "query_lengths": "query_norms",
    }
    _scan = staticmethod(prefix_sum)
    _argmax = staticmethod(argmax_over_ranges)

    _source: Tensor | Callable[[], Tensor]
    visibility: Visibility
    _known: dict[str, Tensor] = field(default_factory=dict, init=False)
    # Tensors whose norms have a gradient, and what takes theirs: `widened`.
    wide: list[tuple[Tensor, Tensor]] = field(default_factory=list, init=False)

    @property
    def k(self) -> Tensor:
        return self._source if isinstance(self._source, Tensor) else self._once("k", self._source)

    @property
    def norms(self) -> Tensor:
        return self._once("norms", self._norms)

    @property
    def norm_sum(self) -> Tensor:
        return self._once("norm_sum", self._norm_sum)

    @property
    def norm_square_sum(self) -> Tensor:
        return self._once("norm_square_sum", self._norm_square_sum)

    @property
    def norm_max(self) -> Tensor:
        return self._once("norm_max", self._norm_max)

    def query_norms(self, q: Tensor) -> Tensor:
        """Euclidean norms of the queries q [B, Hq, Sq, D]: [B, Hq, Sq], fp32 (fp64 for fp64 q), differentiable.

        0 for a row without keys, whatever it holds.
        """
        return self._norms_of(q, None if self.visibility.every_row_sees else self.visibility.seeing_rows())

    def _norms_of(self, x: Tensor, seen: Tensor | None) -> Tensor:
        return key_norms_of(x, seen, self.visibility.invariant)

    def widened(self, call: AttentionCall) -> AttentionCall:
        """The call with gradients in fp32 for q and k, where gradients of their norms are added to them."""
        return call

    def _once(self, name: str, compute: Callable[[], Tensor]) -> Tensor:
        # Not functools.cached_property: torch.compile cannot trace its lock (Python < 3.12).
        if name not in self._known:
            self._known[name] = compute()
        return self._known[name]

    def _norms(self) -> Tensor:
        return self._norms_of(self.k, self._counted_keys())

    def _counted_keys(self) -> Tensor | None:
        return self.visibility.counted_keys(lambda: key_norms_of(self.k.detach(), None, self.visibility.invariant))

    def _norm_sum(self) -> Tensor:
        return sum_over_keys(self.norms, self.visibility, self._scan, self.norms.dtype)

    def _norm_square_sum(self) -> Tensor:
        return sum_over_keys(self.norms.double().square(), self.visibility, self._scan)

    def _norm_max(self) -> Tensor:
        return max_over_keys(self.norms, self.visibility, self._scan, self._argmax)


class DoubleStatistics(Statistics):
    """Statistics in fp64, for a factor that enters another: gradients towards it may leave fp32's range."""

    def __init__(self, statistics: Statistics) -> None:
        super().__init__(lambda: statistics.k, statistics.visibility)
        self._narrow = statistics

    def query_norms(self, q: Tensor) -> Tensor:
        return self._narrow.query_norms(q).double()

    def _norms(self) -> Tensor:
        return self._narrow.norms.double()

    def _norm_sum(self) -> Tensor:
        return self._narrow.norm_sum.double()

    def _norm_square_sum(self) -> Tensor:
        return self._narrow.norm_square_sum

    def _norm_max(self) -> Tensor:
        return self._narrow.norm_max.double()


def sum_over_keys(
    x: Tensor, visible: Visibility, scan: Scan = prefix_sum, dtype: torch.dtype = torch.float64
) -> Tensor:
    """Sum of x [B, Hkv, Sk] over the keys visible to each row: [B, Hkv, Sq] in a dtype, 0 for a row without keys.

    Where query heads see different keys (`per_query_head`) the result is [B, Hq, Sq]. Accumulates in fp64, so that a
    short window late in a long sequence is as exact as an early one; scan is what computes prefix sums.
    """
    if visible.invariant:  # bits that follow the row's sequence alone
        return _invariant_sum(x, visible, scan, dtype)
    if visible.left is None and visible.is_full:  # one number for all rows
        return x.sum(-1, keepdim=True, dtype=torch.float64).expand(*x.shape[:-1], visible.q_len).to(dtype)
    if visible.mask is not None:  # holes, for which each pair is read
        return ranges.sum_over_mask(_per_mask_head(x, visible), *visible.bounds(), visible.mask).to(dtype)
    if visible.is_causal:  # a prefix sum a row, whose position the sizes tell
        if x.device.type == "cpu" and scan is prefix_sum:  # which says why not elsewhere
            return x.cumsum(-1, dtype=torch.float64)[..., visible.k_len - visible.q_len :].to(dtype)
        return ranges.sum_over_prefixes(x, None, visible.q_len, scan, dtype)
    return _sum_over_ranges(x, visible, scan, dtype)


def _invariant_sum(x: Tensor, visible: Visibility, scan: Scan, dtype: torch.dtype) -> Tensor:
    """`sum_over_keys` where sums run from the first key of the row's sequence on."""
    if visible.mask is not None:
        raise NotImplementedError("batch_invariant: not supported with sums of key norms under a mask; use key_ranges")
    if visible.sequences is not None:
        return _as_padded(x, visible, lambda x, padded: _invariant_sum(x, padded, scan, dtype))
    if (first := visible.first_keys()) is not None:
        x, visible = ranges.rolled(x, first, 2), visible.from_keys(first)
    return _sum_over_ranges(x, visible, scan, dtype)


def _sum_over_ranges(x: Tensor, visible: Visibility, scan: Scan, dtype: torch.dtype) -> Tensor:
    if visible.begins_at_first:  # a prefix sum a row
        return ranges.sum_over_prefixes(x, visible.ends()[:, None], visible.q_len, scan, dtype)
    lo, hi = visible.bounds()  # a difference of two
    return ranges.sum_over_ranges(x, lo[:, None], hi[:, None], visible.key_ranges is None, scan, dtype)


def max_over_keys(
    x: Tensor, visible: Visibility, scan: Scan = prefix_sum, argmax: Argmax = argmax_over_ranges
) -> Tensor:
    """Maximum of x [B, Hkv, Sk] over the visible keys, shapes as `sum_over_keys`, in x's dtype; 0 without keys.

    The lowest key that attains the maximum takes its gradient; scan as in `sum_over_keys`, and argmax finds those keys.
    """
    if visible.invariant and visible.sequences is not None:  # gradients that follow the row's sequence alone
        return _as_padded(x, visible, lambda x, padded: max_over_keys(x, padded, scan, argmax))
    if visible.mask is not None:  # holes, for which each pair is read
        x = _per_mask_head(x, visible)
        first, seen = ranges.argmax_over_mask(x.detach(), *visible.bounds(), visible.mask)
        return ranges.pick(x, first, seen, False, scan)
    if visible.left is None and visible.is_full and visible.k_len > 0:  # one key for all rows
        first = x.detach().argmax(-1, keepdim=True).expand(*x.shape[:-1], visible.q_len)
        return ranges.pick(x, first, None, True, scan)
    if visible.is_prefix_or_empty and argmax is argmax_over_ranges:  # a running maximum, in O(Sk) time
        return _max_of_prefixes(x, visible, scan)
    lo, hi = visible.bounds()
    first = argmax(x.detach(), lo[:, None], hi[:, None])
    seen = None if visible.every_row_sees else visible.seeing_rows()
    return ranges.pick(x, first, seen, visible.key_ranges is None, scan)


def _max_of_prefixes(x: Tensor, visible: Visibility, scan: Scan) -> Tensor:
    first = ranges.argmax_of_prefixes(x.detach())
    if visible.is_causal:
        return ranges.pick(x, first[..., visible.k_len - visible.q_len :], None, True, scan)
    last = (visible.ends() - 1).clamp(min=0)[:, None]
    first = last.expand(*x.shape[:-1], -1) if visible.k_len == 0 else ranges.gather(first, last)
    return ranges.pick(x, first, visible.seeing_rows(), True, scan)


def _as_padded(x: Tensor, visible: Visibility, compute: Callable[[Tensor, Visibility], Tensor]) -> Tensor:
    """A statistic [1, H, T_q] of x [1, H, T_k] of packed sequences, computed for a padded batch of them."""
    sequences = visible.sequences
    assert sequences is not None
    rows = PackedAxis(sequences.q_starts.long(), sequences.longest_q, visible.q_len)
    keys = PackedAxis(sequences.k_starts.long(), sequences.longest_k, visible.k_len)
    sizes = (rows.starts.shape[0] - 1, visible.q_heads, visible.kv_heads, rows.longest, keys.longest)
    masks = {"left": visible.left, "right": visible.right, "invariant": True}
    padded = Visibility.of_padded(sizes, visible.device, keys.counts, rows.counts, **masks)
    return rows.packed(compute(keys.unpacked(x), padded))


def _per_mask_head(x: Tensor, visible: Visibility) -> Tensor:
    group = visible.q_heads // visible.kv_heads if visible.kv_heads else 1
    return x.repeat_interleave(group, dim=1) if visible.per_query_head and group > 1 else x


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
        is_readable = runs_eagerly(k) and k.device.type == "cpu" and k.numel() > 0
        if invariant:
            norms = _by_pieces(lambda piece: _norms_of(piece, _invariant_norm), k)
        else:
            norms = _norms_on_cpu(k) if is_readable else _norms_of(k)
        return norms if seen is None else torch.where(seen, norms, 0)

    @staticmethod
    def setup_context(ctx, inputs, output) -> None:
        ctx.save_for_backward(inputs[0], output)

    @staticmethod
    def backward(ctx, g: Tensor):
        k, norms = ctx.saved_tensors
        counted = norms > 0
        direction = k / torch.where(counted, norms, 1)[..., None]
        return (direction * g[..., None]).masked_fill_(~counted[..., None], 0).to(k.dtype), None, None


# Keys that are widened at a time: a widened copy of all of k would be the peak of a call's memory.
_ROWS = 1024


def _norms_on_cpu(k: Tensor) -> Tensor:
    """Compute `_norms_of` in one pass, and in full where the results show that a square over- or underflowed."""
    norms = _norm(k) if k.dtype.itemsize > 2 else _by_pieces(_norm, k)
    lowest, highest = torch.aminmax(norms)
    is_safe = _is_safe(lowest.item()) and _is_safe(highest.item())  # neither where one is NaN
    return norms if is_safe else _by_pieces(_norms_of, k)


def _by_pieces(norms: Callable[[Tensor], Tensor], k: Tensor) -> Tensor:
    if not runs_eagerly(k) or k.dim() < 2 or k.shape[-2] <= _ROWS:  # a trace would bind the number of keys
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
    """Whether a norm, or each of a tensor, comes from squares that neither over- nor underflowed in fp32.

    The bounds are literals: torch.compile(dynamic=True) would make inputs of globals, which two functions cannot share.
    """
    return (norms > 1e-15) & (norms < 1e15)


def _invariant_norm(k: Tensor) -> Tensor:
    wide = k.to(torch.promote_types(k.dtype, torch.float32))
    return halving_sum(wide.square())[..., 0].sqrt()


def _norm(k: Tensor) -> Tensor:
    return torch.linalg.vector_norm(k, dim=-1, dtype=torch.promote_types(k.dtype, torch.float32))
