"""Arithmetic over ranges of keys: sums, maxima and the rows that touch a key, without a dense mask and without atomics.

lo and hi are int64, [..., Sq], 0 <= lo <= hi <= Sk: row i covers the keys lo[i] <= j < hi[i]. A dense bool mask, where
there is one, is read a block of rows at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from .autograd import apply, first_order, runs_eagerly

# Entries that a pass over a dense mask holds at a time, or those of a row: 32 MiB in fp64, on a GPU, whose every block
# is several launches, 256. Code that is traced holds none of them, and would unroll as many blocks: its rows are fixed.
_ENTRIES = 2**22
_ENTRIES_OF_GPU = 2**25
_TRACED_ROWS = 256

Scan = Callable[[Tensor], Tensor]  # `prefix_sum`, or another that computes it


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
    block = max(1, entries // max(heads * k_len, 1)) if runs_eagerly(lo, mask) else _TRACED_ROWS
    for start in range(0, max(q_len, 1), block):
        rows = slice(start, min(start + block, q_len))
        yield rows, pairs(lo, hi, mask, k_len, rows)


def prefix_sum(x: Tensor) -> Tensor:
    """fp64 sums of x over [0, j) along the last axis, j = 0 .. n: [..., n] -> [..., n + 1]."""
    total = F.pad(x.double(), (1, 0))
    if x.device.type == "cpu":
        return total.cumsum(-1)
    # torch.cumsum on CUDA refuses torch.use_deterministic_algorithms; doubling sums in a fixed order.
    shift = 1
    while shift < total.shape[-1]:
        total = total + F.pad(total[..., :-shift], (shift, 0))
        shift *= 2
    return total


def gather(x: Tensor, index: Tensor) -> Tensor:
    """x[..., index] along the last axis, with the others broadcast: take_along_dim without its failure in inductor."""
    shape = torch.broadcast_shapes(x.shape[:-1], index.shape[:-1])
    return x.expand(*shape, -1).gather(-1, index.expand(*shape, -1))


def rolled(x: Tensor, first: Tensor, axis: int) -> Tensor:
    """x [B, ...] with the Sk keys of entry b, on an axis, in the order first[b], first[b] + 1 ..., 0 ..., first[b] - 1.

    first int64 [B], 0 <= first <= Sk; Sk - first rolls back.
    """
    return apply(_Rolled, x, first, axis)


class _Rolled(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(x, first, axis) -> Tensor:
        count = x.shape[axis]
        key = torch.arange(count, device=x.device) + first[:, None]  # [B, Sk]
        key = torch.where(key < count, key, key - count)
        shape = [count if at == axis else 1 for at in range(1, x.dim())]
        return x.gather(axis, key.view(key.shape[0], *shape).expand(x.shape))

    @staticmethod
    def setup_context(ctx, inputs, output) -> None:
        x, first, ctx.axis = inputs
        ctx.save_for_backward(x.shape[ctx.axis] - first)

    @staticmethod
    @first_order
    def backward(ctx, saved, g: Tensor):
        (back,) = saved
        return rolled(g, back, ctx.axis), None, None


def rows_begun(bound: Tensor, k_len: int) -> Tensor:
    """Count for each key j the rows with bound <= j: int64 [..., Sk]; bound [..., Sq] does not fall along the rows."""
    keys = torch.arange(k_len, device=bound.device)
    if runs_eagerly(bound):
        keys = keys.expand(*bound.shape[:-1], -1).contiguous()
    else:
        keys = keys + bound.new_zeros((*bound.shape[:-1], 1))  # dense, in vmap too
    return torch.searchsorted(bound.contiguous(), keys, right=True)


def rows_of_keys(lo: Tensor, hi: Tensor, k_len: int, sorted_bounds: bool) -> Tensor:
    """The number of rows that attend to each key: int64 [..., Sk]; sorted_bounds: neither falls along the rows."""
    bounds = (lo, hi) if sorted_bounds else (lo.sort(dim=-1).values, hi.sort(dim=-1).values)
    begun, ended = (rows_begun(bound, k_len) for bound in bounds)
    return begun - ended


def sum_of_rows(g: Tensor, lo: Tensor | None, hi: Tensor, k_len: int, sorted_bounds: bool, scan: Scan) -> Tensor:
    """y[j] = sum of g[i] over the rows with lo[i] <= j < hi[i]: the transpose of a sum over ranges, without atomics.

    g [B, H, Sq], lo and hi broadcastable to it, lo None is 0; sorted_bounds: neither falls along the rows.
    """
    if lo is not None and not sorted_bounds:
        return _sum_of_begun(g, lo, k_len, scan) - _sum_of_begun(g, hi, k_len, scan)
    sums = scan(g)
    begun = sums[..., -1:] if lo is None else gather(sums, rows_begun(lo, k_len))
    return begun - gather(sums, rows_begun(hi, k_len))


def _sum_of_begun(g: Tensor, bound: Tensor, k_len: int, scan: Scan) -> Tensor:
    """The sum of g over the rows with bound <= j, whose bounds are in no order."""
    bound, order = bound.sort(dim=-1, stable=True)
    return gather(scan(gather(g, order)), rows_begun(bound, k_len))


def pick(x: Tensor, key: Tensor, seen: Tensor | None, sorted_keys: bool, scan: Scan) -> Tensor:
    """x[..., key] where seen, else 0; the gradient returns to the picked keys in a fixed order.

    seen None says that all are; sorted_keys says that key does not fall along the rows; scan as in `sum_of_rows`.
    """
    return apply(_Pick, x, key, seen, sorted_keys, scan)


class _Pick(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(x, key, seen, sorted_keys, scan) -> Tensor:
        if x.shape[-1] == 0:
            return x.new_zeros(key.shape)
        return _where(seen, gather(x, key))

    @staticmethod
    def setup_context(ctx, inputs, output) -> None:
        x, key, seen, ctx.sorted_keys, ctx.scan = inputs
        ctx.k_len, ctx.dtype = x.shape[-1], x.dtype
        ctx.save_for_backward(key, seen)

    @staticmethod
    @first_order
    def backward(ctx, saved, g: Tensor):
        key, seen = saved
        d_x = sum_of_rows(_where(seen, g), key, key + 1, ctx.k_len, ctx.sorted_keys, ctx.scan)
        return d_x.to(ctx.dtype), None, None, None, None


def _where(seen: Tensor | None, x: Tensor) -> Tensor:
    return x if seen is None else torch.where(seen, x, 0)


def sum_over_mask(x: Tensor, lo: Tensor, hi: Tensor, mask: Tensor) -> Tensor:
    """Sum of x [B, H, Sk] over the pairs inside range and mask: fp64 [B, H, Sq]."""
    return apply(_MaskSum, x, lo, hi, mask)


class _MaskSum(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, lo: Tensor, hi: Tensor, mask: Tensor) -> Tensor:
        wide = x.double()[:, :, None]  # [B, H, 1, Sk]
        tiles = row_tiles(lo, hi, mask, x.shape[-1], x.shape[0] * x.shape[1])
        sums = [torch.where(tile, wide, 0).sum(-1) for _, tile in tiles]
        return torch.cat(sums, dim=-1)

    @staticmethod
    def setup_context(ctx, inputs, output) -> None:
        x, lo, hi, mask = inputs
        ctx.k_len, ctx.dtype = x.shape[-1], x.dtype
        ctx.save_for_backward(lo, hi, mask)

    @staticmethod
    @first_order
    def backward(ctx, saved, g: Tensor):
        dx = g.new_zeros((*g.shape[:2], ctx.k_len))
        lo, hi, mask = saved
        for rows, tile in row_tiles(lo, hi, mask, ctx.k_len, g.shape[0] * g.shape[1]):
            dx = dx + torch.where(tile, g[:, :, rows, None], 0).sum(-2)
        return dx.to(ctx.dtype), None, None, None


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
