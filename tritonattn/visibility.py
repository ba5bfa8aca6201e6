"""Which keys each query row may see: one record for every mask.

Row i of batch entry b sees the keys lo[b, i] <= j < hi[b, i]. Causal attention, windows, padding, packed documents and
caches filled in part are all such ranges, so counts are differences, and sums over visible keys are differences of
prefix sums. A dense bool mask is the fallback for holes; it is intersected with the ranges.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from .autograd import first_order

# Rows that a pass over a dense mask holds at a time: bounds its memory to [B, H, 256, Sk].
_MASK_ROWS = 256


@dataclass(frozen=True, eq=False)
class Visibility:
    """The visible keys of every query row.

    left, right   row i sees i + Sk - Sq - left <= j <= i + Sk - Sq + right; None is unlimited; causal is right = 0
    key_lengths   int [B]: row i sees j < key_lengths[b]
    key_ranges    int [B, Sq, 2]: row i sees key_ranges[b, i, 0] <= j < key_ranges[b, i, 1]
    mask          bool, 4-D, each axis of [B, Hq, Sq, Sk] or 1: True is visible

    Every part that is given narrows the rest. Values outside [0, Sk] are clamped, lo >= hi is a row without keys.
    """

    batch: int
    q_heads: int
    kv_heads: int
    q_len: int
    k_len: int
    device: torch.device
    left: int | None = None
    right: int | None = None
    key_lengths: Tensor | None = None
    key_ranges: Tensor | None = None
    mask: Tensor | None = None

    @classmethod
    def of(
        cls,
        q: Tensor,
        k: Tensor,
        *,
        causal: bool = False,
        window: tuple[int | None, int | None] | None = None,
        key_lengths: Tensor | None = None,
        key_ranges: Tensor | None = None,
        mask: Tensor | None = None,
    ) -> Visibility:
        """The record for q [B, Hq, Sq, D] and k [B, Hkv, Sk, D] from checked arguments of `attention`."""
        left, right = (None if side in (None, -1) else side for side in window or (None, None))
        if causal:
            right = 0 if right is None else min(right, 0)
        if key_ranges is not None and key_ranges.dim() == 4:
            key_ranges = key_ranges.squeeze(1)
        if mask is not None:
            mask = mask[(None,) * (4 - mask.dim())]
        batch, q_heads, q_len, _ = q.shape
        _, kv_heads, k_len, _ = k.shape
        return cls(
            batch, q_heads, kv_heads, q_len, k_len, q.device, left, right, key_lengths, key_ranges, mask
        )  # fmt: skip

    @property
    def is_full(self) -> bool:
        """Whether every row sees every key."""
        return all(
            part is None for part in (self.left, self.right, self.key_lengths, self.key_ranges, self.mask)
        )

    @property
    def is_square_causal(self) -> bool:
        """Whether the visible keys are the lower triangle of a square, and nothing else."""
        rest = (self.left, self.key_lengths, self.key_ranges, self.mask)
        return self.right == 0 and self.q_len == self.k_len and all(part is None for part in rest)

    @property
    def every_row_sees(self) -> bool:
        """Whether sizes, causal and window alone say that every row sees a key."""
        hides = (self.key_lengths, self.key_ranges, self.mask)
        return self.q_len <= self.k_len and self.k_len > 0 and all(part is None for part in hides)

    @property
    def per_query_head(self) -> bool:
        """Whether the query heads of one key head may see different keys (a mask with a head axis)."""
        return self.mask is not None and self.mask.shape[1] > 1

    def ranges(self) -> tuple[Tensor, Tensor]:
        """lo and hi, int64, [B, Sq] or [1, Sq] where causal and window alone say it; 0 <= lo <= hi <= Sk."""
        own = torch.arange(self.q_len, device=self.device)[None] + (self.k_len - self.q_len)  # [1, Sq]
        lo = torch.zeros_like(own) if self.left is None else own - self.left
        hi = torch.full_like(own, self.k_len) if self.right is None else own + self.right + 1
        if self.key_ranges is not None:
            lo = torch.maximum(lo, self.key_ranges[..., 0])
            hi = torch.minimum(hi, self.key_ranges[..., 1])
        if self.key_lengths is not None:
            hi = torch.minimum(hi, self.key_lengths.long()[:, None])
        lo = lo.clamp(0, self.k_len)
        return lo, torch.maximum(hi.clamp(0, self.k_len), lo)

    def counts(self) -> Tensor:
        """n, the number of visible keys: fp64 [B or 1, 1 or Hq, Sq]."""
        if self.mask is None:
            lo, hi = self.ranges()
            return (hi - lo)[:, None].double()
        return torch.cat([tile.sum(-1) for _, tile in self._mask_tiles()], dim=-1).double()

    def sum(self, x: Tensor) -> Tensor:
        """Sum of x [B, Hkv, Sk] over the keys visible to each row: fp64 [B, Hkv, Sq], 0 for a row without keys.

        Where query heads see different keys (`per_query_head`) the result is [B, Hq, Sq]. Differentiable, without
        atomics. Accumulates in fp64, so that a short window late in a long sequence is as exact as an early one.
        """
        if self.mask is not None:
            return _MaskSum.apply(self._per_mask_head(x), *self.ranges(), self.mask)
        return self.sum_from_prefix(x, prefix_sum(x.detach()))

    def sum_from_prefix(self, x: Tensor, prefix: Tensor) -> Tensor:
        """`sum(x)` from its prefix sums, fp64 [B, Hkv, Sk + 1], without a dense mask. The gradient goes to x."""
        lo, hi = self.ranges()
        return _RangeSum.apply(x, prefix, lo[:, None], hi[:, None], self.key_ranges is None)

    def max(self, x: Tensor) -> Tensor:
        """Maximum of x [B, Hkv, Sk] over the visible keys, shapes as `sum`, in x's dtype; 0 for a row without keys.

        The lowest key that attains the maximum takes its gradient.
        """
        if self.mask is not None:
            x = self._per_mask_head(x)
            first, seen = self._mask_argmax(x)
        else:
            lo, hi = self.ranges()
            first, seen = _range_argmax(x.detach(), lo[:, None], hi[:, None]), (hi > lo)[:, None]
        return _Pick.apply(x, first, seen.expand_as(first))

    def seen_keys(self) -> Tensor:
        """Keys that at least one row sees: bool [B or 1, 1 or Hkv, Sk]."""
        if self.mask is None:
            lo, hi = self.ranges()
            rows = torch.ones_like(lo, dtype=torch.float64)[:, None]
            return _sum_rows(rows, lo[:, None], hi[:, None], self.k_len, self.key_ranges is None) > 0
        seen = torch.zeros((), dtype=torch.bool, device=self.device)
        for _, tile in self._mask_tiles():
            seen = seen | tile.any(-2)
        if self.per_query_head:
            seen = seen.unflatten(1, (self.kv_heads, -1)).any(2)
        return seen.expand(-1, -1, self.k_len)

    def rows_of_key_blocks(self, block: int) -> Tensor:
        """First and one past the last row whose range touches each block of keys: int32 [B or 1, cdiv(Sk, block), 2].

        A block that no range touches has first >= last. Every range is the union of two spans of 2^level blocks; the
        extremes of each span are pushed down to single blocks: O((Sq + blocks) log blocks), without atomics.
        """
        lo, hi = self.ranges()
        blocks = -(-self.k_len // block)
        first, span = lo // block, (hi + block - 1) // block - lo // block
        levels = max(blocks, 1).bit_length()
        level = sum((span >= 1 << power).long() for power in range(1, levels)) + torch.zeros_like(span)
        nowhere = torch.full_like(span, levels * blocks)
        spans = [first, first + span - (1 << level)]
        slots = torch.cat([torch.where(hi > lo, level * blocks + start, nowhere) for start in spans], dim=-1)
        row = torch.arange(self.q_len, device=self.device).repeat(2).expand_as(slots)
        extremes = []
        for reduce, empty, rows in (("amin", self.q_len, row), ("amax", 0, row + 1)):
            table = torch.full((lo.shape[0], levels * blocks + 1), empty, device=self.device)
            table = table.scatter_reduce(-1, slots, rows, reduce)[:, :-1].unflatten(-1, (levels, blocks))
            narrower = torch.minimum if reduce == "amin" else torch.maximum
            spread = table[:, -1]
            for power in reversed(range(levels - 1)):
                shifted = torch.full_like(spread, empty)
                shifted[:, 1 << power :] = spread[:, : -(1 << power)]
                spread = narrower(table[:, power], narrower(spread, shifted))
            extremes.append(spread)
        return torch.stack(extremes, dim=-1).int()

    def dense(self) -> Tensor:
        """The visible pairs, bool [B or 1, 1 or Hq, Sq, Sk]: O(Sq Sk), for the reference."""
        return self.tile(slice(0, self.q_len), slice(0, self.k_len))

    def tile(self, rows: slice, keys: slice) -> Tensor:
        """The visible pairs of some rows and keys, bool [B or 1, 1 or Hq, rows, keys]."""
        key = torch.arange(self.k_len, device=self.device)[keys]
        return _tile(*self.ranges(), self.mask, rows, key, keys)

    def _mask_tiles(self) -> Iterator[tuple[slice, Tensor]]:
        return _row_tiles(*self.ranges(), self.mask, self.k_len)

    def _per_mask_head(self, x: Tensor) -> Tensor:
        group = self.q_heads // self.kv_heads if self.kv_heads else 1
        return x.repeat_interleave(group, dim=1) if self.per_query_head and group > 1 else x

    def _mask_argmax(self, x: Tensor) -> tuple[Tensor, Tensor]:
        first, seen = [], []
        for _, tile in self._mask_tiles():
            hidden = torch.where(tile, x.detach()[:, :, None], -torch.inf)  # [B, H, rows, Sk]
            first.append(hidden.argmax(-1) if self.k_len else hidden.new_zeros(hidden.shape[:-1], dtype=torch.int64))
            seen.append(tile.any(-1))
        return torch.cat(first, dim=-1), torch.cat(seen, dim=-1)


def _tile(lo: Tensor, hi: Tensor, mask: Tensor | None, rows: slice, key: Tensor, keys: slice) -> Tensor:
    """The visible pairs of some rows and of the keys numbered `key`, which are the slice `keys`."""
    lo, hi = (bound[:, None, rows, None] for bound in (lo, hi))
    visible = (key >= lo) & (key < hi)
    if mask is None:
        return visible
    mask = mask if mask.shape[2] == 1 else mask[:, :, rows]
    return visible & (mask if mask.shape[3] == 1 else mask[..., keys])


def _row_tiles(lo: Tensor, hi: Tensor, mask: Tensor | None, k_len: int) -> Iterator[tuple[slice, Tensor]]:
    """The visible pairs, a block of rows and all keys at a time."""
    q_len, key, keys = lo.shape[-1], torch.arange(k_len, device=lo.device), slice(0, k_len)
    for start in range(0, max(q_len, 1), _MASK_ROWS):
        rows = slice(start, min(start + _MASK_ROWS, q_len))
        yield rows, _tile(lo, hi, mask, rows, key, keys)


def prefix_sum(x: Tensor) -> Tensor:
    """fp64 sums of x over [0, j) along the last axis, j = 0 .. n: [..., n] -> [..., n + 1]."""
    total = torch.nn.functional.pad(x.double(), (1, 0))
    if x.device.type == "cpu":
        return total.cumsum(-1)
    # torch.cumsum on CUDA refuses torch.use_deterministic_algorithms; doubling sums in a fixed order.
    shift = 1
    while shift < total.shape[-1]:
        total = total + torch.nn.functional.pad(total[..., :-shift], (shift, 0))
        shift *= 2
    return total


def _gather(x: Tensor, index: Tensor) -> Tensor:
    """x[..., index] along the last axis, the others broadcast: take_along_dim, on which inductor fails."""
    shape = torch.broadcast_shapes(x.shape[:-1], index.shape[:-1])
    return x.expand(*shape, -1).gather(-1, index.expand(*shape, -1))


def _sum_rows(g: Tensor, lo: Tensor, hi: Tensor, k_len: int, sorted_bounds: bool) -> Tensor:
    """y[j] = sum of g[i] over the rows with lo[i] <= j < hi[i]: the transpose of a sum over ranges, without atomics.

    g [B, H, Sq], lo and hi broadcastable to it; sorted_bounds says that lo and hi do not fall along the rows.
    """
    keys = torch.arange(k_len, device=g.device)

    def ending_by_key(bound: Tensor) -> Tensor:  # sum of g over the rows with bound <= j
        if sorted_bounds:
            prefix = prefix_sum(g)
        else:
            bound, order = bound.sort(dim=-1, stable=True)
            prefix = prefix_sum(_gather(g, order))
        wanted = keys + bound.new_zeros((*bound.shape[:-1], 1))
        rows = torch.searchsorted(bound.contiguous(), wanted, right=True)
        return _gather(prefix, rows)

    return ending_by_key(lo) - ending_by_key(hi)


class _RangeSum(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, prefix: Tensor, lo: Tensor, hi: Tensor, sorted_bounds: bool) -> Tensor:
        return _gather(prefix, hi) - _gather(prefix, lo)

    @staticmethod
    def setup_context(ctx, inputs, output) -> None:
        x, _, lo, hi, ctx.sorted_bounds = inputs
        ctx.k_len, ctx.dtype = x.shape[-1], x.dtype
        ctx.save_for_backward(lo, hi)

    @staticmethod
    @first_order
    def backward(ctx, saved, g: Tensor):
        lo, hi = saved
        seeing = torch.where(hi > lo, g, 0)  # the factor of a row without keys may have an infinite slope
        return _sum_rows(seeing, lo, hi, ctx.k_len, ctx.sorted_bounds).to(ctx.dtype), None, None, None, None


class _Pick(torch.autograd.Function):
    """x[..., key] where seen, else 0; the gradient returns to the picked keys in a fixed order."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, key: Tensor, seen: Tensor) -> Tensor:
        if x.shape[-1] == 0:
            return x.new_zeros(key.shape)
        return torch.where(seen, _gather(x, key), 0)

    @staticmethod
    def setup_context(ctx, inputs, output) -> None:
        x, key, seen = inputs
        ctx.k_len, ctx.dtype = x.shape[-1], x.dtype
        ctx.save_for_backward(key, seen)

    @staticmethod
    @first_order
    def backward(ctx, saved, g: Tensor):
        key, seen = saved
        picked = torch.where(seen, g, 0)
        return _sum_rows(picked, key, key + 1, ctx.k_len, sorted_bounds=False).to(ctx.dtype), None, None


class _MaskSum(torch.autograd.Function):
    """Sum over the visible entries under a dense mask, a block of rows at a time."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, lo: Tensor, hi: Tensor, mask: Tensor) -> Tensor:
        wide = x.double()[:, :, None]  # [B, H, 1, Sk]
        sums = [torch.where(tile, wide, 0).sum(-1) for _, tile in _row_tiles(lo, hi, mask, x.shape[-1])]
        return torch.cat(sums, dim=-1)

    @staticmethod
    def setup_context(ctx, inputs, output) -> None:
        x, lo, hi, mask = inputs
        ctx.shape, ctx.dtype = x.shape, x.dtype
        ctx.save_for_backward(lo, hi, mask)

    @staticmethod
    @first_order
    def backward(ctx, saved, g: Tensor):
        dx = g.new_zeros(ctx.shape)
        lo, hi, mask = saved
        for rows, tile in _row_tiles(lo, hi, mask, ctx.shape[-1]):
            dx = dx + torch.where(tile, g[:, :, rows, None], 0).sum(-2)
        return dx.to(ctx.dtype), None, None, None


def _range_argmax(x: Tensor, lo: Tensor, hi: Tensor) -> Tensor:
    """Lowest key of [lo, hi) that attains the maximum of x there: int64 [B, H, Sq]; any key for an empty range.

    x [B, H, Sk], lo and hi [B or 1, 1, Sq]. Level by level `best` holds the argmax of x over [j, j + width), width a
    power of two; a range is the union of two such spans of the largest width that fits. O(S log S) time, O(S) memory.
    """
    shape = (*x.shape[:-1], lo.shape[-1])
    answer = torch.zeros(shape, dtype=torch.int64, device=x.device)
    k_len = x.shape[-1]
    best = torch.arange(k_len, device=x.device).expand_as(x)
    width = 1
    while width <= k_len:
        top = k_len - width
        first = _gather(best, lo.clamp(max=top))
        last = _gather(best, (hi - width).clamp(0, top))
        fits = (hi - lo >= width) & (hi - lo < 2 * width)
        answer = torch.where(fits, _larger(x, first, last), answer)
        if 2 * width <= k_len:
            best = _larger(x, best[..., :-width], best[..., width:])
        width *= 2
    return answer


def _larger(x: Tensor, first: Tensor, last: Tensor) -> Tensor:
    """The index of the larger entry of x, the first of equals; NaN is larger than all."""
    a, b = _gather(x, first), _gather(x, last)
    return torch.where((b > a) | (b.isnan() & ~a.isnan()), last, first)
