"""Launches of passes over the ranges of keys that rows see: prefix sums, maxima, keys seen, rows that see them."""

from __future__ import annotations

import torch
from torch import Tensor

from ...core.visibility import Visibility
from ...tuning.config import Problem
from . import range_kernels as kernels
from .launch import KERNELS, Arguments, Plan, kept_kind, plan, range_arguments

KERNELS |= {
    "row_bounds": kernels.rows_of_key_block,
    "keys_seen": kernels.keys_seen,
    "argmax_of_ranges": kernels.argmax_of_ranges,
}
NO_HEADS = Problem(1, 1, torch.float32)


def prefix_sums(addends: Tensor) -> Tensor:
    """fp64 sums of addends [B, H, n], of any float dtype, over [0, j), j = 0 .. n: [B, H, n + 1]."""
    batch, heads, count = addends.shape
    sums = torch.empty((batch, heads, count + 1), dtype=torch.float64, device=addends.device)
    arguments = {"addends_ptr": addends.contiguous(), "sums_ptr": sums, "addends_len": count, "q_heads": heads}
    kind = kept_kind((addends.dtype,), lambda: (NO_HEADS, False))
    _plan("prefix_sums", addends.device).launch((1, heads, batch), arguments, False, kind)
    return sums


def argmax_over_ranges(x: Tensor, lo: Tensor, hi: Tensor) -> Tensor:
    """`ranges.argmax_over_ranges` of norms x, fp32 [B, H, Sk], at least 0 or NaN; lo and hi int64 [B or 1, 1, Sq]."""
    (batch, heads, k_len), q_len = x.shape, lo.shape[-1]
    lo, hi = torch.broadcast_tensors(lo, hi)
    argmax = torch.empty((batch, heads, q_len), dtype=torch.int64, device=x.device)
    arguments = {
        "x_ptr": x.contiguous(),
        "lo_ptr": lo.contiguous(),
        "hi_ptr": hi.contiguous(),
        "argmax_ptr": argmax,
        "q_len": q_len,
        "k_len": k_len,
        "q_heads": heads,
        "bounds_len": q_len if lo.shape[0] > 1 else 0,
    }
    chosen = _plan("argmax_of_ranges", x.device)
    chosen.launch((-(-q_len // chosen.config.block_m), heads, batch), arguments, False)
    return argmax


def seen_keys(visible: Visibility, arguments: Arguments | None = None) -> Tensor:
    """`Visibility.seen_keys`, by a kernel where `block.key_range` knows what rows see.

    arguments   of `range_arguments`, where a caller has them
    """
    if visible.mask is not None or not visible.is_bottom_right:
        return visible.seen_keys()
    seen = torch.empty((visible.batch, visible.k_len), dtype=torch.uint8, device=visible.device)
    chosen = _plan("keys_seen", visible.device)
    grid = (-(-visible.k_len // chosen.config.block_n), 1, visible.batch)
    arguments = range_arguments(visible) if arguments is None else arguments
    chosen.launch(grid, arguments | {"keys_seen_ptr": seen}, False)
    return seen.view(torch.bool)[:, None]


def rows_of_key_blocks(visible: Visibility, arguments: Arguments, key_block: int) -> Tensor | None:
    """First and one past the last row that a block of keys needs, int32 [B, key blocks, 2]; None without key_ranges.

    arguments   of `range_arguments`, and any others
    """
    if visible.key_ranges is None:
        return None
    blocks = -(-visible.k_len // key_block)
    bounds = torch.empty((visible.batch, blocks, 2), dtype=torch.int32, device=visible.device)
    arguments = arguments | {"bounds_ptr": bounds, "key_block": key_block}
    _plan("row_bounds", visible.device).launch((blocks, 1, visible.batch), arguments, False)
    return bounds


def seen_bytes(seen: Tensor, keys: tuple[int, ...]) -> Tensor:
    """`seen`, broadcastable to keys, [B, Hkv, Sk], as kernels read it: uint8, contiguous."""
    return seen.expand(keys).contiguous().view(torch.uint8)


def _plan(kernel: str, device: torch.device) -> Plan:
    """The plan of a pass over ranges, which has no head dim and no options."""
    return plan(kernel, NO_HEADS, device)
