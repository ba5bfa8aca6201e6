"""Key statistics: sums and maxima of key norms over the keys visible to each row, and their reciprocals.

    norm[j]            = ||k[j]||
    norm_sum[i]        = sum of norm[j]      over the keys j visible to row i
    norm_square_sum[i] = sum of norm[j]^2    likewise
    norm_max[i]        = max of norm[j]      likewise

Everything here is differentiable with respect to k and takes O(S) memory more than k. A kernel that computes the
same quantities stands in for this class by overriding its underscore methods.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import Function

from . import ranges
from .autograd import Linear, apply, kept, save, values_are_read
from .call import AttentionCall
from .norms import key_norms_of
from .ranges import Scan, argmax_over_ranges, prefix_sum
from .sequences import PackedAxis
from .visibility import Visibility

Argmax = Callable[[Tensor, Tensor, Tensor], Tensor]

# Below it a statistic counts as zero: its reciprocal need not fit fp32.
SMALLEST_STATISTIC = torch.finfo(torch.float32).tiny
_LARGEST_ZERO = math.nextafter(SMALLEST_STATISTIC, 0)
_LARGEST_ZERO_SQUARE = math.nextafter(SMALLEST_STATISTIC**2, 0)
_LARGEST_ZERO_OF_FLOAT32 = SMALLEST_STATISTIC - 2.0**-149


def at_first_use(name: str) -> Any:
    """A property of `Statistics`, which its method `_name` computes at the first use, and which is then kept.

    Not functools.cached_property: torch.compile cannot trace its lock (Python < 3.12).
    """

    def known(statistics: Statistics) -> Tensor:
        if name not in statistics._known:
            statistics._known[name] = getattr(statistics, f"_{name}")()
        return statistics._known[name]

    return property(known)


@dataclass(eq=False)
class Statistics:
    """Lazily computed statistics of the keys k, or k(), [B, Hkv, Sk, D] that each row of `visibility` attends to.

    norms             [B, Hkv, Sk]   fp32; 0 for a key that no row attends to, whatever it holds
    norm_sum          [B, Hkv, Sq]   fp32
    norm_square_sum   [B, Hkv, Sq]   fp64, since the square of an fp32 norm need not fit fp32
    norm_max          [B, Hkv, Sq]   fp32; the lowest key that attains the maximum takes its gradient

    Row statistics are [B, Hq, Sq] where the query heads of a group attend to different keys
    (`visibility.per_query_head`), and 0 for a row without keys. k in fp64 gives fp64 everywhere. Each is
    computed at its first use and kept.
    """

    _scan = staticmethod(prefix_sum)
    _argmax = staticmethod(argmax_over_ranges)

    _source: Tensor | Callable[[], Tensor]
    visibility: Visibility
    _known: dict[str, Tensor] = field(default_factory=dict, init=False)
    # Tensors whose norms have a gradient, and copies that take theirs: `widened`.
    in_fp32: list[tuple[Tensor, Tensor]] = field(default_factory=list, init=False)

    norms, norm_sum = at_first_use("norms"), at_first_use("norm_sum")
    norm_square_sum, norm_max = at_first_use("norm_square_sum"), at_first_use("norm_max")

    @property
    def k(self) -> Tensor:
        if not isinstance(self._source, Tensor):
            self._source = self._source()
        return self._source

    def query_norms(self, q: Tensor) -> Tensor:
        """Euclidean norms of the queries q [B, Hq, Sq, D]: [B, Hq, Sq], fp32 (fp64 for fp64 q), differentiable.

        0 for a row without keys, whatever it holds.
        """
        return self._norms_of(q, None if self.visibility.every_row_attends else self.visibility.attending_rows())

    def _norms_of(self, x: Tensor, seen: Tensor | None) -> Tensor:
        return key_norms_of(x, seen, self.visibility.invariant)

    def widened(self, call: AttentionCall) -> AttentionCall:
        """The call with gradients in fp32 for q and k, where gradients of their norms are added to them."""
        return call

    def _norms(self) -> Tensor:
        visible = self.visibility
        counted = counted_keys(visible, lambda: key_norms_of(self.k.detach(), None, visible.invariant))
        return self._norms_of(self.k, counted)

    def _norm_sum(self) -> Tensor:
        norms = self.norms
        return sum_over_keys(norms, self.visibility, self._scan, norms.dtype)

    def _norm_square_sum(self) -> Tensor:
        return sum_over_keys(self.norms.double().square(), self.visibility, self._scan)

    def _norm_max(self) -> Tensor:
        return max_over_keys(self.norms, self.visibility, self._scan, self._argmax)


class DoubleStatistics(Statistics):
    """Statistics in fp64, for a factor that enters another: gradients towards it may leave fp32's range."""

    def __init__(self, statistics: Statistics) -> None:
        super().__init__(lambda: statistics.k, statistics.visibility)
        self._given = statistics

    def query_norms(self, q: Tensor) -> Tensor:
        return self._given.query_norms(q).double()

    def _norms(self) -> Tensor:
        return self._given.norms.double()

    def _norm_sum(self) -> Tensor:
        return self._given.norm_sum.double()

    def _norm_square_sum(self) -> Tensor:
        return self._given.norm_square_sum

    def _norm_max(self) -> Tensor:
        return self._given.norm_max.double()


def counted_keys(visible: Visibility, norms: Callable[[], Tensor]) -> Tensor | None:
    """Keys whose norms are taken, as `Visibility.seen_keys`; None for all.

    Where `invariant`, those that have left every window too: sums over a window are differences. Only norms that do not
    swallow the others are among them: such a key may hold anything. norms computes them all, [B, Hkv, Sk].
    """
    if visible.attends_to_every_key:
        return None
    has_windows = visible.left is not None and visible.mask is None and visible.q_len > 0
    if not (visible.invariant and has_windows):
        return visible.shared("counted keys", lambda: _seen_or_none(visible.seen_keys()))
    seen = visible.seen_keys()
    key = torch.arange(visible.k_len, device=visible.device)
    if visible.sequences is not None:
        is_key = (key < visible.sequences.k_starts[-1])[None, None]
    else:
        is_key = (key < visible.ranges()[1].amax(-1, keepdim=True))[:, None]
    return seen | (is_key & (norms() < 1e15))  # next to a longer one, fp64 keeps no digit of 1


def _seen_or_none(seen: Tensor) -> Tensor | None:
    """`seen`, or None where it is read and all are."""
    return None if values_are_read(seen) and bool(seen.all()) else seen


def sum_over_keys(
    x: Tensor, visible: Visibility, scan: Scan = prefix_sum, dtype: torch.dtype = torch.float64
) -> Tensor:
    """Sum of x [B, Hkv, Sk] over the keys visible to each row: [B, Hkv, Sq] in a dtype, 0 for a row without keys.

    Where query heads attend to different keys (`per_query_head`) the result is [B, Hq, Sq]. Accumulates in fp64, so
    that a short window late in a long sequence is as exact as an early one; scan is what computes prefix sums. They
    begin again at each packed document.
    """
    if visible.invariant:  # in the order of the row's sequence: no bit follows the rest of the batch
        if visible.mask is not None:
            raise NotImplementedError(
                "batch_invariant: not supported with sums of key norms under a mask; use key_ranges"
            )
        if visible.sequences is not None:
            return _as_padded(x, visible, lambda x, padded: sum_over_keys(x, padded, scan, dtype))
        if (first := visible.first_keys()) is not None:
            x, visible = ranges.rolled(x, first, 2), visible.from_keys(first)
    elif visible.left is None and visible.is_full:  # one number for all rows
        return x.sum(-1, keepdim=True, dtype=torch.float64).expand(*x.shape[:-1], visible.q_len).to(dtype)
    elif visible.mask is not None:  # holes, for which each pair is read
        return ranges.sum_over_mask(_per_mask_head(x, visible), *visible.ranges(), visible.mask).to(dtype)
    elif scan is prefix_sum and x.device.type == "cpu" and visible.is_causal:  # torch's sums are differentiable
        return x.cumsum(-1, dtype=torch.float64)[..., visible.k_len - visible.q_len :].to(dtype)
    order = ranges.IN_ORDER
    if visible.is_causal:  # a prefix sum per row, whose end the sizes tell
        lo = hi = None
    elif visible.begins_at_first:  # a prefix sum per row
        lo, hi = None, visible.ends()[:, None]
    else:  # a difference of two
        lo, hi = (bound[:, None] for bound in visible.ranges())
        order = visible.order
    return _Sums(visible.q_len, x.shape[-1], order, scan, dtype, x.dtype)(x, lo, hi)


@dataclass(eq=False)
class _Sums(Linear):
    """Sums of x [B, H, Sk] over the ranges [lo, hi) of Sq rows, in fp64, rounded to `dtype`: [B, H, Sq].

    lo None is 0; hi None, with lo None, is hi[i] = i + 1 + Sk - Sq.
    """

    q_len: int
    k_len: int
    order: ranges.Order
    scan: Scan
    dtype: torch.dtype
    dtype_of_x: torch.dtype

    def there(self, x: Tensor, lo: Tensor | None, hi: Tensor | None) -> Tensor:
        if hi is None:
            return self.scan(x, None)[..., self.k_len - self.q_len + 1 :].to(self.dtype)
        return ranges.sum_of_keys(x, lo, hi, self.order, self.scan).to(self.dtype)

    def back(self, x: Tensor, lo: Tensor | None, hi: Tensor | None) -> Tensor:
        if hi is None:
            sums, earlier_keys = self.scan(x, None), self.k_len - self.q_len
            ended = F.pad(sums[..., :-1], (earlier_keys, 0)) if earlier_keys else sums[..., :-1]
            return (sums[..., -1:] - ended).to(self.dtype_of_x)
        x = torch.where(hi > (0 if lo is None else lo), x, 0)  # a factor without keys may have an infinite slope
        return ranges.sum_of_rows(x, lo, hi, self.k_len, self.order, self.scan).to(self.dtype_of_x)


def max_over_keys(
    x: Tensor, visible: Visibility, scan: Scan = prefix_sum, argmax: Argmax = argmax_over_ranges
) -> Tensor:
    """Maximum of x [B, Hkv, Sk] over the visible keys, shapes as `sum_over_keys`, in x's dtype; 0 without keys.

    The lowest key that attains the maximum takes its gradient; scan as in `sum_over_keys`, and argmax finds those keys.
    """
    if visible.invariant and visible.sequences is not None:  # gradients that follow the row's sequence alone
        return _as_padded(x, visible, lambda x, padded: max_over_keys(x, padded, scan, argmax))
    seen, order = None, visible.order
    if visible.mask is not None:  # holes, for which each pair is read
        x = _per_mask_head(x, visible)
        key, seen = ranges.argmax_over_mask(x.detach(), *visible.ranges(), visible.mask)
    elif visible.left is None and visible.is_full and visible.k_len > 0:  # one key for all rows
        key = x.detach().argmax(-1, keepdim=True).expand(*x.shape[:-1], visible.q_len)
    else:
        seen = None if visible.every_row_attends else visible.attending_rows()
        if visible.is_prefix_or_empty and argmax is argmax_over_ranges:  # a running maximum, in O(Sk) time
            key = _argmax_of_prefixes(x.detach(), visible)
        else:
            key = argmax(x.detach(), *(bound[:, None] for bound in visible.ranges()))
    return ranges.pick(x, key, seen, order, scan)


def _argmax_of_prefixes(x: Tensor, visible: Visibility) -> Tensor:
    first = ranges.argmax_of_prefixes(x)
    if visible.is_causal:
        return first[..., visible.k_len - visible.q_len :]
    last = (visible.ends() - 1).clamp(min=0)[:, None]
    return last.expand(*x.shape[:-1], -1) if visible.k_len == 0 else ranges.gather(first, last)


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


def counts_of(visibility: Visibility, factor: Callable[[Tensor], Tensor] | None = None) -> Tensor:
    """`visibility.counts()`, or a factor of them, read-only: where sizes alone decide it is `kept`.

    factor   a function of counts of any shape, the same for the same counts
    """
    if visibility.depends_on_sizes_only:
        sizes = visibility.q_len, visibility.k_len, visibility.left, visibility.right
        return kept(_counts_of_sizes, visibility.device, *sizes, factor)
    counts = visibility.shared("counts", visibility.counts)
    return counts if factor is None else factor(counts)


def _counts_of_sizes(
    device: torch.device,
    q_len: int,
    k_len: int,
    left: int | None,
    right: int | None,
    factor: Callable[[Tensor], Tensor] | None,
) -> Tensor:
    counts = Visibility(1, 1, 1, q_len, k_len, device, left, right).counts()
    return counts if factor is None else factor(counts)


def reciprocal(statistic: Tensor) -> Tensor:
    """1 / s; 0, with gradient 0, where s is 0 or below fp32's normal range; NaN stays NaN.

    fp64, or fp32 of fp32 s that is not traced.
    """
    if statistic.dtype == torch.float32 and not torch.compiler.is_compiling():
        return apply(_Reciprocal, statistic)
    return torch.threshold(statistic.double(), _LARGEST_ZERO, math.inf).reciprocal()


class _Reciprocal(Function):
    """`reciprocal` of fp32 in fp32: half the operators that fp64 takes. Its slope -1 / s^2 leaves fp32's range."""

    generate_vmap_rule = True

    @staticmethod
    def forward(statistic: Tensor) -> Tensor:
        return torch.threshold(statistic, _LARGEST_ZERO_OF_FLOAT32, math.inf).reciprocal()

    @staticmethod
    def setup_context(ctx, inputs, output) -> None:
        save(ctx, output)

    @staticmethod
    def backward(ctx, g: Tensor):
        (factor,) = ctx.saved_tensors
        return (g * factor) * -factor

    tangent = backward


def reciprocal_root(square: Tensor) -> Tensor:
    """1 / sqrt(x) in fp64; 0, with gradient 0, where the root is 0 or below fp32's normal range; NaN stays NaN."""
    return torch.threshold(square.double(), _LARGEST_ZERO_SQUARE, math.inf).rsqrt()
