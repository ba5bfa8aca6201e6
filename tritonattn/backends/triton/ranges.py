"""Passes over the ranges of rows: which keys are visible to some row, to which rows, the maximum of each range."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...core.visibility import Visibility
from ...tuning.config import Problem
from .block import LENGTHS, program_position
from .launch import KERNELS, Plan, Specialisation, plan
from .pairs import key_range, pass_bounds, whole_blocks
from .records import View, view_of


@triton.jit(do_not_specialize=LENGTHS)
def row_bounds_kernel(
    key_lengths,
    key_ranges,
    bounds_ptr,
    left,
    right,
    q_len,
    k_len,
    key_block,
    first_y,
    first_z,
    BLOCK_M: tl.constexpr,
):
    """The first row that attends to a key of one block of keys, and one past the last; first >= last where none does.

    Grid: (blocks of key_block keys, 1, B). bounds int32 [B, blocks, 2], contiguous; the other arguments as in
    `key_range`.
    """
    block, _, batch = program_position(first_y, first_z, LAST_FIRST=False)
    view = View(q_len, k_len, left, right, key_lengths, key_ranges)
    first_key = block * key_block
    first, end = tl.full([BLOCK_M], 0, tl.int32) + q_len, tl.full([BLOCK_M], 0, tl.int32)
    for start in range(0, q_len, BLOCK_M):
        offs_m = start + tl.arange(0, BLOCK_M)  # [BLOCK_M]
        row = tl.minimum(offs_m, q_len - 1)
        lo, hi = key_range(row, batch, view)
        touches = (tl.maximum(lo, first_key) < tl.minimum(hi, first_key + key_block)) & (offs_m < q_len)
        first = tl.minimum(first, tl.where(touches, row, q_len))
        end = tl.maximum(end, tl.where(touches, row + 1, 0))
    bounds_ptr += (batch.to(tl.int64) * tl.num_programs(0) + block) * 2
    tl.store(bounds_ptr, tl.min(first, 0))
    tl.store(bounds_ptr + 1, tl.max(end, 0))


@triton.jit(do_not_specialize=LENGTHS)
def keys_seen(
    key_lengths,
    key_ranges,
    keys_seen_ptr,
    left,
    right,
    q_len,
    k_len,
    first_y,
    first_z,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Mark the keys, of a block of BLOCK_N, that are visible to some row.

    Grid: (blocks of Sk, 1, B). keys_seen uint8 [B, Sk], contiguous; the other arguments as in `key_range`.
    The loop starts at the last row, which has most keys under a causal mask, and ends when every key has been seen. A
    step tests if any of BLOCK_M rows touches the block, and then takes them by BLOCK_N: with tiles of more rows AMD's
    compiler spills the scalar registers that hold what rows have in common.
    """
    block, _, batch = program_position(first_y, first_z, LAST_FIRST=False)
    view = View(q_len, k_len, left, right, key_lengths, key_ranges)
    first_key = block * BLOCK_N
    offs_n = first_key + tl.arange(0, BLOCK_N)  # [BLOCK_N]
    seen = (offs_n >= k_len).to(tl.int32)
    start = (q_len - 1) // BLOCK_M * BLOCK_M
    while (start >= 0) & (start < q_len) & (tl.min(seen, 0) == 0):
        row = tl.minimum(start + tl.arange(0, BLOCK_M), q_len - 1)
        lo, hi = key_range(row, batch, view)
        touches = tl.maximum(lo, first_key) < tl.minimum(hi, first_key + BLOCK_N)
        first = start - 1
        if tl.max(touches.to(tl.int32), 0) > 0:
            first = (tl.minimum(start + BLOCK_M, q_len) - 1) // BLOCK_N * BLOCK_N
        while (first >= start) & (tl.min(seen, 0) == 0):
            few = tl.minimum(first + tl.arange(0, BLOCK_N), q_len - 1)
            few_lo, few_hi = key_range(few, batch, view)
            covers = (few_lo[:, None] <= offs_n[None, :]) & (offs_n[None, :] < few_hi[:, None])  # [BLOCK_N, BLOCK_N]
            seen = tl.maximum(seen, tl.max(covers.to(tl.int32), 0))
            first -= BLOCK_N
        start -= BLOCK_M
    tl.store(keys_seen_ptr + batch.to(tl.int64) * k_len + offs_n, seen, mask=offs_n < k_len)


@triton.jit
def _ranked(x, key):
    """int64 in the order of x >= 0, NaN highest; of equal x the lower key is the higher."""
    magnitude = x.to(tl.int32, bitcast=True) & 0x7FFFFFFF
    return (magnitude.to(tl.int64) << 32) | (0x7FFFFFFF - key).to(tl.int64)


@triton.jit(do_not_specialize=LENGTHS)
def argmax_of_ranges(
    x_ptr,
    lo_ptr,
    hi_ptr,
    argmax_ptr,
    q_len,
    k_len,
    q_heads,
    bounds_len,
    first_y,
    first_z,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """The lowest key that attains the maximum of x over the range of each of BLOCK_M rows.

    For an empty range it is lo, or the last key where lo is no key. Keys in the ranges of all rows are scanned once.

    Grid: (blocks of Sq, H, B). x fp32 [B, H, Sk], at least 0 or NaN; lo and hi int64 [B or 1, Sq], 0 <= lo <= hi <= Sk,
    bounds_len their stride from one batch entry to the next, Sq or 0; argmax int64 [B, H, Sq]. All contiguous.
    """
    block, head, batch = program_position(first_y, first_z, LAST_FIRST=True)
    offs_m = block * BLOCK_M + tl.arange(0, BLOCK_M)  # [BLOCK_M]
    row = tl.minimum(offs_m, q_len - 1)
    lo = tl.load(lo_ptr + batch.to(tl.int64) * bounds_len + row).to(tl.int32)
    hi = tl.load(hi_ptr + batch.to(tl.int64) * bounds_len + row).to(tl.int32)
    kv_start, kv_end = tl.min(tl.where(lo < hi, lo, k_len), 0), tl.max(tl.where(lo < hi, hi, 0), 0)
    full_start, full_end = whole_blocks(kv_start, tl.max(lo, 0), tl.min(hi, 0), BLOCK_N, False)
    x_ptr += (batch.to(tl.int64) * q_heads + head) * k_len
    columns = tl.arange(0, BLOCK_N)
    of_all = tl.full([BLOCK_N], -1, tl.int64)  # [BLOCK_N]
    for start in range(full_start, full_end, BLOCK_N):
        of_all = tl.maximum(of_all, _ranked(tl.load(x_ptr + start + columns), start + columns))
    largest = tl.full([BLOCK_M], -1, tl.int64)  # [BLOCK_M]
    _, _, first, end, gap_start, gap = pass_bounds(kv_start, kv_end, full_start, full_end, BLOCK_N, 0, False)
    for position in range(first, end, BLOCK_N):
        offs_n = tl.where(position >= gap_start, position + gap, position) + columns
        x = tl.load(x_ptr + offs_n, mask=(offs_n >= kv_start) & (offs_n < kv_end), other=0.0)
        visible = (offs_n[None, :] >= lo[:, None]) & (offs_n[None, :] < hi[:, None])  # [BLOCK_M, BLOCK_N]
        largest = tl.maximum(largest, tl.max(tl.where(visible, _ranked(x, offs_n)[None, :], -1), 1))
    largest = tl.maximum(largest, tl.max(of_all, 0))
    key = tl.where(largest < 0, tl.minimum(lo, k_len - 1), 0x7FFFFFFF - (largest & 0x7FFFFFFF).to(tl.int32))
    tl.store(argmax_ptr + (batch.to(tl.int64) * q_heads + head) * q_len + offs_m, key, mask=offs_m < q_len)


KERNELS |= {
    "row_bounds": row_bounds_kernel,
    "keys_seen": keys_seen,
    "argmax_of_ranges": argmax_of_ranges,
}
NO_HEADS = Problem(1, 1, torch.float32)
_WITHOUT_HEADS = Specialisation(NO_HEADS, wide=False)


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
    chosen.launch((-(-q_len // chosen.config.block_m), heads, batch), arguments)
    return argmax


def seen_keys(visible: Visibility, view: View | None = None) -> Tensor:
    """`Visibility.seen_keys`, by a kernel where `pairs.key_range` has the visible keys.

    view   `view_of(visible)`, where a caller has it
    """
    if visible.mask is not None or not visible.is_bottom_right:
        return visible.seen_keys()
    seen = torch.empty((visible.batch, visible.k_len), dtype=torch.uint8, device=visible.device)
    chosen = _plan("keys_seen", visible.device)
    grid = (-(-visible.k_len // chosen.config.block_n), 1, visible.batch)
    view = view_of(visible) if view is None else view
    chosen.launch(grid, view._asdict() | {"keys_seen_ptr": seen})
    return seen.view(torch.bool)[:, None]


def rows_of_key_blocks(visible: Visibility, view: View, key_block: int) -> Tensor:
    """First and one past the last row that a block of keys needs under key_ranges, int32 [B, key blocks, 2].

    view   `view_of(visible)`
    """
    blocks = -(-visible.k_len // key_block)
    bounds = torch.empty((visible.batch, blocks, 2), dtype=torch.int32, device=visible.device)
    arguments = view._asdict() | {"bounds_ptr": bounds, "key_block": key_block}
    _plan("row_bounds", visible.device).launch((blocks, 1, visible.batch), arguments)
    return bounds


def seen_bytes(seen: Tensor, keys: tuple[int, ...]) -> Tensor:
    """`seen`, broadcastable to keys, [B, Hkv, Sk], as kernels read it: uint8, contiguous."""
    return seen.expand(keys).contiguous().view(torch.uint8)


def _plan(kernel: str, device: torch.device) -> Plan:
    """The plan of a pass over ranges, which has no head dim and no options."""
    return plan(kernel, _WITHOUT_HEADS, device)
