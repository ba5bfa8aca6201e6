"""Backward, which rows a block of keys needs where ranges of keys say what rows see."""

from __future__ import annotations

import triton
import triton.language as tl

from .primitives import COUNTS, LENGTHS, program_position, row_range


@triton.jit(do_not_specialize=LENGTHS, do_not_specialize_on_alignment=COUNTS)
def rows_of_key_block(
    key_lengths_ptr, key_ranges_ptr, bounds_ptr, left, right, q_len, k_len, key_block, first_head, first_member,
    BLOCK_M: tl.constexpr,
):  # fmt: skip
    """First and one past the last row that sees a key of one block of keys; first >= last where none does.

    Grid: (blocks of key_block keys, 1, B). bounds int32 [B, blocks, 2], contiguous; the other arguments as in
    `primitives.row_range`.
    """
    block, _, batch = program_position(first_head, first_member, LAST_FIRST=False)
    first_key = block * key_block
    first, end = tl.full([BLOCK_M], 0, tl.int32) + q_len, tl.full([BLOCK_M], 0, tl.int32)
    for start in range(0, q_len, BLOCK_M):
        offs_m = start + tl.arange(0, BLOCK_M)
        row = tl.minimum(offs_m, q_len - 1)
        lo, hi = row_range(row, batch, q_len, k_len, left, right, key_lengths_ptr, key_ranges_ptr)
        touches = (tl.maximum(lo, first_key) < tl.minimum(hi, first_key + key_block)) & (offs_m < q_len)
        first = tl.minimum(first, tl.where(touches, row, q_len))
        end = tl.maximum(end, tl.where(touches, row + 1, 0))
    bounds_ptr += (batch.to(tl.int64) * tl.num_programs(0) + block) * 2
    tl.store(bounds_ptr, tl.min(first, 0))
    tl.store(bounds_ptr + 1, tl.max(end, 0))
