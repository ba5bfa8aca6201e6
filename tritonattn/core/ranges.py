"""Arithmetic over ranges of keys: sums, maxima and the rows that touch a key, without a dense mask and without atomics.

lo and hi are int64, [..., Sq], 0 <= lo <= hi <= Sk: row i covers the keys lo[i] <= j < hi[i]. A dense bool mask, where
there is one, is read a block of rows at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .autograd import Linear, values_are_read

# Entries that a pass over a dense mask holds at a time, or those of a row: 32 MiB in fp64, on a GPU, whose every block
# is several launches, 256. Code that is traced holds none of them, and would unroll as many blocks: its rows are fixed.
_ENTRIES = 2**22
_ENTRIES_OF_GPU = 2**25
_TRACED_ROWS = 256

# Entries of a segment, of all heads, whose sums by doubling take as long as a call that adds a segment up.
_SUMMED = 256

_LEVELS = 31  # of doubling: no axis is longer than 2^31

# No sequence is longer; a position and a window's side, both below it, add up to less than 2^63.
_UNREACHED = 2**62

Scan = Callable[[Tensor, "Tensor | None"], Tensor]  # `prefix_sum`, or another that computes it


class Order(NamedTuple):
    """The order of the ranges of rows.

    is_sorted   neither lo nor hi falls along the rows
    restarts    sums begin again at each key, or row, that no range crosses, so that what one packed document holds is
                in no sum of another; sums over rows that are not sorted always do
    """

    is_sorted: bool
    restarts: bool


IN_ORDER = Order(is_sorted=True, restarts=False)


def window_sides(window: tuple[int | None, int | None] | None) -> tuple[int | None, int | None]:
    """left and right of a window as users write it; None is no limit, as is sys.maxsize."""
    if window is None:
        return None, None
    left, right = (None if side in (None, -1) or side >= _UNREACHED else side for side in window)
    return left, right


def later(bound: Tensor | None, other: Tensor) -> Tensor:
    """The later of two bounds; None is no bound."""
    return other if bound is None else torch.maximum(bound, other)


def earlier(bound: Tensor | None, other: Tensor) -> Tensor:
    return other if bound is None else torch.minimum(bound, other)


def pairs(lo: Tensor, hi: Tensor, mask: Tensor | None, k_len: int, rows: slice = slice(None)) -> Tensor:
    """The visible pairs of all or some rows, with all keys: bool [B or 1, 1 or Hq, rows, Sk]."""
    lo, hi = (bound[:, None, rows, None] for bound in (lo, hi))
    key = torch.arange(k_len, device=lo.device)
    visible = (key >= lo) & (key < hi)
    if mask is None:
        return visible
    return visible & (mask if mask.shape[2] == 1 else mask[:, :, rows])


def row_tiles(lo: Tensor, hi: Tensor, mask: Tensor, k_len: int, heads: int) -> Iterator[tuple[slice, Tensor]]:
    """Yield the `pairs` of one block of rows after another, as many rows as `heads` heads allow."""
    q_len, entries = lo.shape[-1], _ENTRIES if lo.device.type == "cpu" else _ENTRIES_OF_GPU
    is_real = values_are_read(lo, mask, waits=True)
    block = max(1, entries // max(heads * k_len, 1)) if is_real else _TRACED_ROWS
    hides = not values_are_read(lo, mask) or bool(((lo > 0) | (hi < k_len)).any())  # ranges do beside the mask
    for start in range(0, max(q_len, 1), block):
        rows = slice(start, min(start + block, q_len))
        if hides:
            yield rows, pairs(lo, hi, mask, k_len, rows)
        else:
            part = mask if mask.shape[2] == 1 else mask[:, :, rows]
            yield rows, part.expand(-1, -1, rows.stop - rows.start, k_len)


def prefix_sum(x: Tensor, restarts: Tensor | None = None) -> Tensor:
    """fp64 sums of x over [0, j) along the last axis, j = 0 .. n: [..., n] -> [..., n + 1].

    restarts   bool, broadcastable to x: the sums begin again at these entries, and nothing before them is in a later
               one; entry j is then the sum over [c, j), c the last of them below j
    """
    if restarts is not None:
        return _restarted_sum(x.double(), restarts)
    total = F.pad(x.double(), (1, 0))
    if x.device.type == "cpu":
        return total.cumsum(-1)
    # torch.cumsum on CUDA refuses torch.use_deterministic_algorithms; doubling sums in a fixed order.
    shift = 1
    while shift < total.shape[-1]:
        total = total + F.pad(total[..., :-shift], (shift, 0))
        shift *= 2
    return total


def _restarted_sum(total: Tensor, restarts: Tensor) -> Tensor:
    if values_are_read(restarts) and restarts.numel() == total.shape[-1]:  # the same for all heads and entries
        starts = restarts.flatten().nonzero().flatten().tolist()
        if total.numel() >= _SUMMED * len(starts):
            segments = [segment.cumsum(-1) for segment in total.tensor_split(starts, -1)]
            return F.pad(torch.cat(segments, -1), (1, 0))
    entry = torch.arange(total.shape[-1], device=total.device)
    since = entry - torch.where(restarts, entry, 0).cummax(-1).values  # entries since the last restart
    if values_are_read(since):
        levels = int(since.max()).bit_length()
    else:  # a trace would bind the length
        is_free = torch.compiler.is_compiling() or not isinstance(total.shape[-1], int)
        levels = _LEVELS if is_free else max(total.shape[-1] - 1, 0).bit_length()
    for level in range(levels):
        total = total + torch.where(since >= 1 << level, total.roll(1 << level, -1), 0)
    return F.pad(total, (1, 0))


def gather(x: Tensor, index: Tensor) -> Tensor:
    """x[..., index] along the last axis, for an index whose others broadcast to those of x."""
    return x.gather(-1, index.expand(*x.shape[:-1], -1))


def rolled(x: Tensor, first: Tensor, axis: int) -> Tensor:
    """x [B, ...] with the Sk keys of entry b, on an axis, in the order first[b], first[b] + 1 ..., 0 ..., first[b] - 1.

    first int64 [B], 0 <= first <= Sk; Sk - first rolls back.
    """
    return _Roll(axis)(x, first)


@dataclass(eq=False)
class _Roll(Linear):
    axis: int

    def there(self, x: Tensor, first: Tensor) -> Tensor:
        axis, count = self.axis, x.shape[self.axis]
        key = torch.arange(count, device=x.device) + first[:, None]  # [B, Sk]
        key = torch.where(key < count, key, key - count)
        shape = [count if at == axis else 1 for at in range(1, x.dim())]
        return x.gather(axis, key.view(key.shape[0], *shape).expand(x.shape))

    def back(self, x: Tensor, first: Tensor) -> Tensor:
        return self.there(x, x.shape[self.axis] - first)


def rows_begun(bound: Tensor, k_len: int) -> Tensor:
    """Count for each key j the rows with bound <= j: int64 [..., Sk]; bound [..., Sq] does not fall along the rows."""
    keys = bound.new_empty((*bound.shape[:-1], k_len), dtype=torch.int64)  # dense, in vmap too
    return torch.searchsorted(bound.contiguous(), keys.copy_(torch.arange(k_len, device=bound.device)), right=True)


def rows_of_keys(lo: Tensor, hi: Tensor, k_len: int, sorted_bounds: bool) -> Tensor:
    """The number of rows that attend to each key: int64 [..., Sk]; sorted_bounds: neither falls along the rows."""
    bounds = (lo, hi) if sorted_bounds else (lo.sort(dim=-1).values, hi.sort(dim=-1).values)
    begun, ended = (rows_begun(bound, k_len) for bound in bounds)
    return begun - ended


def sum_of_keys(x: Tensor, lo: Tensor | None, hi: Tensor, order: Order, scan: Scan) -> Tensor:
    """y[i] = sum of x[j] over lo[i] <= j < hi[i], fp64: x [B, H, Sk], lo and hi broadcastable to [B, H, Sq]."""
    if lo is None or not order.restarts:
        sums = scan(x, None)
        ends = gather(sums, hi)
        return ends if lo is None else ends - gather(sums, lo)
    restarts = _uncrossed(lo, hi, x.shape[-1])
    sums = scan(x, restarts[..., :-1])
    before = torch.where(gather(restarts, lo), 0, gather(sums, lo))
    return torch.where(hi > lo, gather(sums, hi) - before, 0)


def _uncrossed(lo: Tensor, hi: Tensor, k_len: int) -> Tensor:
    """True at each position j of 0 .. Sk that no range crosses, as lo < j < hi does: bool [..., Sk + 1]."""
    ends = lo.new_zeros((*lo.shape[:-1], k_len + 2)).scatter_reduce_(-1, lo + 1, hi, "amax")
    furthest = ends.cummax(-1).values[..., :-1]  # of the ranges that begin before
    return furthest <= torch.arange(k_len + 1, device=lo.device)


def sum_of_rows(g: Tensor, lo: Tensor | None, hi: Tensor, k_len: int, order: Order, scan: Scan) -> Tensor:
    """y[j] = sum of g[i] over the rows with lo[i] <= j < hi[i]: the transpose of `sum_of_keys`, without atomics.

    g [B, H, Sq], 0 for an empty range.
    """
    if lo is None or (order.is_sorted and not order.restarts):
        sums = scan(g, None)
        begun = sums[..., -1:] if lo is None else gather(sums, rows_begun(lo, k_len))
        return begun - gather(sums, rows_begun(hi, k_len))
    by_begin, by_end, hi = g, g, torch.maximum(hi, lo + 1)
    if not order.is_sorted:
        lo, of_begins = lo.sort(dim=-1, stable=True)
        hi, of_ends = hi.sort(dim=-1, stable=True)
        by_begin, by_end = gather(g, of_begins), gather(g, of_ends)
    begun, ended = rows_begun(lo, k_len), rows_begun(hi, k_len)
    # Before a key that no range crosses, as many rows have begun as ended: sums begin again at the row after them.
    is_crossed = F.pad(begun, (1, 0))[..., :-1] != ended
    base = torch.where(is_crossed, 0, ended).cummax(-1).values
    held = rows_begun(base, g.shape[-1])
    restarts = held > F.pad(held, (1, 0))[..., :-1]
    sums = scan(by_begin, restarts)
    of_ended = sums if order.is_sorted else scan(by_end, restarts)
    return torch.where(begun > base, gather(sums, begun), 0) - torch.where(ended > base, gather(of_ended, ended), 0)


def pick(x: Tensor, key: Tensor, seen: Tensor | None, order: Order, scan: Scan) -> Tensor:
    """x[..., key] where seen, else 0; the gradient returns to the picked keys in a fixed order.

    seen None says that all are; order of key, and scan as in `sum_of_rows`.
    """
    return _Pick(x.shape[-1], x.dtype, order, scan)(x, key, seen)


@dataclass(eq=False)
class _Pick(Linear):
    k_len: int
    dtype: torch.dtype
    order: Order
    scan: Scan

    def there(self, x: Tensor, key: Tensor, seen: Tensor | None) -> Tensor:
        if x.shape[-1] == 0:
            return x.new_zeros(key.shape)
        return _where(seen, gather(x, key))

    def back(self, x: Tensor, key: Tensor, seen: Tensor | None) -> Tensor:
        return sum_of_rows(_where(seen, x), key, key + 1, self.k_len, self.order, self.scan).to(self.dtype)


def _where(seen: Tensor | None, x: Tensor) -> Tensor:
    return x if seen is None else torch.where(seen, x, 0)


def sum_over_mask(x: Tensor, lo: Tensor, hi: Tensor, mask: Tensor) -> Tensor:
    """Sum of x [B, H, Sk] over the pairs inside range and mask: fp64 [B, H, Sq]."""
    return _MaskSum(x.shape[-1], x.dtype)(x, lo, hi, mask)


@dataclass(eq=False)
class _MaskSum(Linear):
    k_len: int
    dtype: torch.dtype

    def there(self, x: Tensor, lo: Tensor, hi: Tensor, mask: Tensor) -> Tensor:
        wide = x.double()
        tiles = row_tiles(lo, hi, mask, self.k_len, x.shape[0] * x.shape[1])
        return torch.cat([_sum_of_pairs(wide, tile) for _, tile in tiles], dim=-1)

    def back(self, x: Tensor, lo: Tensor, hi: Tensor, mask: Tensor) -> Tensor:
        total = x.new_zeros((*x.shape[:2], self.k_len))
        for rows, tile in row_tiles(lo, hi, mask, self.k_len, x.shape[0] * x.shape[1]):
            total = total + _sum_of_pairs(x.narrow(2, rows.start, tile.shape[2]), tile.mT)
        return total.to(self.dtype)


def _sum_of_pairs(x: Tensor, visible: Tensor) -> Tensor:
    """Sum x [B, H, n] over the visible pairs, bool [B or 1, 1 or H, m, n]: [B, H, m].

    On a CPU as a product of matrices, in which NaN of a hidden pair would reach all sums.
    """
    if values_are_read(x, visible) and bool(x.isfinite().all()):
        if visible.shape[1] == 1:
            return x @ visible[:, 0].mT.to(x.dtype)
        return (x[:, :, None] @ visible.mT.to(x.dtype))[:, :, 0]
    return torch.where(visible, x[:, :, None], 0).sum(-1)


def argmax_over_ranges(x: Tensor, lo: Tensor, hi: Tensor) -> Tensor:
    """Lowest key of [lo, hi) that attains the maximum of x there: int64 [B, H, Sq], in order where lo and hi are.

    For an empty range it is lo, or the last key where lo is none. x [B, H, Sk], lo and hi [B or 1, 1, Sq]. Level by
    level `best` holds the argmax of x over [j, j + width), width a power of two; a range is the union of two such spans
    of the largest width that fits. O(S log S) time, O(S) memory.
    """
    k_len = x.shape[-1]
    answer = lo.clamp(max=max(k_len - 1, 0)).expand(*x.shape[:-1], -1)
    best = torch.arange(k_len, device=x.device).expand_as(x)
    width = 1
    while width <= k_len:
        top = k_len - width
        first = gather(best, lo.clamp(max=top))
        last = gather(best, (hi - width).clamp(0, top))
        fits = (hi - lo >= width) & (hi - lo < 2 * width)
        answer = torch.where(fits, _larger(x, first, last), answer)
        if 2 * width <= k_len:
            best = _larger(x, best[..., :-width], best[..., width:])
        width *= 2
    return answer


def argmax_of_prefixes(x: Tensor) -> Tensor:
    """Lowest key that attains the maximum of x over the keys up to j: int64 [B, H, Sk], which does not fall.

    O(S) time, and the same code for any length, which a trace may leave free.
    """
    if x.shape[-1] == 0:
        return torch.zeros(x.shape, dtype=torch.int64, device=x.device)
    before = F.pad(x.cummax(-1).values, (1, -1), value=-torch.inf)
    rises = (x > before) | (x.isnan() & ~before.isnan())
    return torch.where(rises, torch.arange(x.shape[-1], device=x.device), 0).cummax(-1).values


def argmax_over_mask(x: Tensor, lo: Tensor, hi: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """The lowest key inside range and mask that attains the maximum of x [B, H, Sk], and True where there is one."""
    first, seen = [], []
    for _, tile in row_tiles(lo, hi, mask, x.shape[-1], x.shape[0] * x.shape[1]):
        hidden = torch.where(tile, x[:, :, None], -torch.inf)  # [B, H, rows, Sk]
        first.append(hidden.argmax(-1) if x.shape[-1] else hidden.new_zeros(hidden.shape[:-1], dtype=torch.int64))
        seen.append(tile.any(-1))
    return torch.cat(first, dim=-1), torch.cat(seen, dim=-1)


def _larger(x: Tensor, first: Tensor, last: Tensor) -> Tensor:
    """The index of the larger entry of x, the first of equals; NaN is larger than all."""
    a, b = gather(x, first), gather(x, last)
    return torch.where((b > a) | (b.isnan() & ~a.isnan()), last, first)
