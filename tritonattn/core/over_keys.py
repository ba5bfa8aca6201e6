"""Sums and maxima over the keys that are visible to each row: differentiable, without atomics, in O(Sq + Sk) memory."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from . import ranges
from .packing import Places
from .ranges import argmax_over_ranges, prefix_sum
from .visibility import Visibility

Scan = Callable[[Tensor], Tensor]
Argmax = Callable[[Tensor, Tensor, Tensor], Tensor]


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
    is_causal = visible.is_causal
    if is_causal and scan is prefix_sum and x.device.type == "cpu":  # in one pass, and so its gradient
        return x.cumsum(-1, dtype=torch.float64)[..., visible.k_len - visible.q_len :].to(dtype)
    return _sum_over_ranges(x, visible, is_causal, scan, dtype)


def _invariant_sum(x: Tensor, visible: Visibility, scan: Scan, dtype: torch.dtype) -> Tensor:
    """`sum_over_keys` where sums run from the first key of the row's sequence on."""
    if visible.mask is not None:
        raise NotImplementedError("batch_invariant: not supported with sums of key norms under a mask; use key_ranges")
    if visible.sequences is not None:
        return _as_padded(x, visible, lambda x, padded: _invariant_sum(x, padded, scan, dtype))
    if (first := visible.first_keys()) is not None:
        x, visible = ranges.rolled(x, first, 2), visible.from_keys(first)
    return _sum_over_ranges(x, visible, False, scan, dtype)


def _sum_over_ranges(x: Tensor, visible: Visibility, is_causal: bool, scan: Scan, dtype: torch.dtype) -> Tensor:
    if is_causal or visible.begins_at_first:  # one prefix sum a row, whose place needs no bounds where it is causal
        ends = None if is_causal else visible.ends()[:, None]
        return ranges.sum_over_prefixes(x, ends, visible.q_len, scan, dtype)
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
    rows = Places(sequences.q_starts.long(), sequences.longest_q, visible.q_len)
    keys = Places(sequences.k_starts.long(), sequences.longest_k, visible.k_len)
    sizes = (rows.starts.shape[0] - 1, visible.q_heads, visible.kv_heads, rows.longest, keys.longest)
    masks = {"left": visible.left, "right": visible.right, "invariant": True}
    padded = Visibility.of_padded(sizes, visible.device, keys.counts, rows.counts, **masks)
    return rows.packed(compute(keys.unpacked(x), padded))


def _per_mask_head(x: Tensor, visible: Visibility) -> Tensor:
    group = visible.q_heads // visible.kv_heads if visible.kv_heads else 1
    return x.repeat_interleave(group, dim=1) if visible.per_query_head and group > 1 else x
