"""Forward kernel: output and log-sum-exp of a block of query rows."""

from __future__ import annotations

import triton
import triton.language as tl

from .primitives import (
    COUNTS,
    LENGTHS,
    LN_2,
    LOG2_E,
    TINY_FACTOR,
    key_blocks_of_rows,
    keys_at,
    load_key_scale,
    load_tile,
    program_position,
    row_range,
    scale_rows_add,
    store_tile,
    tile_offsets,
    visible_tile,
)


@triton.jit
def _attend(
    accumulator, running_max, running_sum, q, factor,
    k_ptr, v_ptr, key_scale_ptr, seen_ptr, mask_ptr, offs_row, lo, hi, q_len, k_len,
    touch_lo, touch_hi, full_start, full_end,
    k_stride_s, k_stride_d, v_stride_s, v_stride_d, key_scale_stride_s, mask_stride_q, mask_stride_k,
    HEAD_DIM: tl.constexpr, VALUE_DIM: tl.constexpr, BLOCK_N: tl.constexpr, BOUNDED_BELOW: tl.constexpr,
    PRECISION: tl.constexpr, WIDE: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """Online softmax over the blocks of [full_start, full_end), or, where MASKED, over those around it."""
    start, end = full_start, full_end
    if MASKED:
        start, end = touch_lo // BLOCK_N * BLOCK_N, touch_hi - (full_end - full_start)
    k_offsets = tile_offsets(BLOCK_N, q.shape[1], k_stride_s, k_stride_d, WIDE)
    v_offsets = tile_offsets(BLOCK_N, accumulator.shape[1], v_stride_s, v_stride_d, WIDE)
    for position in tl.range(start, end, BLOCK_N):
        start_n, offs_key, keep_key = keys_at(
            position, full_start, full_end, touch_lo, touch_hi, seen_ptr, BLOCK_N, MASKED
        )
        k = load_tile(k_ptr + start_n.to(tl.int64) * k_stride_s + k_offsets, keep_key, HEAD_DIM, MASKED)
        logits = tl.dot(q, k.T, input_precision=PRECISION)  # [BLOCK_M, BLOCK_N]
        if key_scale_ptr is not None:
            logits *= load_key_scale(key_scale_ptr, offs_key, key_scale_stride_s, keep_key, MASKED)[None, :]
        if MASKED:
            keep = visible_tile(
                offs_row, offs_key, lo, hi, mask_ptr, q_len, k_len, mask_stride_q, mask_stride_k, BOUNDED_BELOW
            )
            logits = tl.where(keep, logits, float("-inf"))
        block_max = tl.maximum(running_max, tl.max(logits, 1) * factor)
        shift = block_max
        if MASKED:
            shift = tl.where(block_max == float("-inf"), 0.0, block_max)
        probabilities = tl.exp2(scale_rows_add(logits, factor, -shift))
        decay = tl.exp2(running_max - shift)
        running_sum = tl.fma(running_sum, decay, tl.sum(probabilities, 1))
        v = load_tile(v_ptr + start_n.to(tl.int64) * v_stride_s + v_offsets, keep_key, VALUE_DIM, MASKED)
        accumulator = accumulator * decay[:, None]
        accumulator = tl.dot(probabilities.to(v.dtype), v, accumulator, input_precision=PRECISION)
        running_max = block_max
    return accumulator, running_max, running_sum


@triton.jit(do_not_specialize=LENGTHS, do_not_specialize_on_alignment=COUNTS)
def attention_forward(
    q_ptr, k_ptr, v_ptr, query_scale_ptr, key_scale_ptr, key_lengths_ptr, key_ranges_ptr, mask_ptr, seen_ptr,
    out_ptr, lse_ptr,
    scale, left, right, q_len, k_len, q_heads, group,
    q_stride_b, q_stride_h, q_stride_s, q_stride_d, k_stride_b, k_stride_h, k_stride_s, k_stride_d,
    v_stride_b, v_stride_h, v_stride_s, v_stride_d, query_scale_stride_b, query_scale_stride_h, query_scale_stride_s,
    key_scale_stride_b, key_scale_stride_h, key_scale_stride_s,
    mask_stride_b, mask_stride_h, mask_stride_q, mask_stride_k,
    HEAD_DIM: tl.constexpr, VALUE_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, PRECISION: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """Attention output and log-sum-exp for BLOCK_M query rows of one (batch, head).

        logit[i, j] = scale * (q[i] . k[j]) * query_scale[i] * key_scale[j]      j visible to i
        lse[i]      = ln sum_j exp(logit[i, j])
        out[i]      = sum_j exp(logit[i, j] - lse[i]) * v[j]

    Grid: cdiv(Sq, BLOCK_M) * B * Hq programs; each writes its rows of out and lse, all of them, once.

    q, k, v          [B, Hq, Sq, D], [B, Hkv, Sk, D], [B, Hkv, Sk, Dv]  fp16, bf16 or fp32, any strides; group = Hq/Hkv
    query_scale      fp32 [B, Hq, Sq] or None = 1, any sign; key_scale  fp32 [B, Hkv, Sk] or None = 1
    key_lengths, key_ranges, left, right: `primitives.row_range`
    mask             uint8, strides of [B, Hq, Sq, Sk] (0 on broadcast axes), or None
    seen             uint8 [B, Hkv, Sk] contiguous or None: keys that some row sees; the rest is never multiplied
    out, lse         [B, Hq, Sq, Dv] in q's dtype and fp32 [B, Hq, Sq] in natural log, contiguous
    BLOCK_D, BLOCK_DV  powers of two >= 16 that hold HEAD_DIM and VALUE_DIM

    Products accumulate in fp32; the scales act in fp32 on the accumulated product; the sign of a row's factor is folded
    into its q, which is exact. P is rounded to v's dtype before P @ V. A row without keys gives out 0, lse -inf.
    Online softmax: Milakov & Gimelshein 2018, arXiv:1805.02867; blocking: Dao 2023, arXiv:2307.08691, Algorithm 1.
    """
    block, batch, head = program_position(q_len, q_heads, BLOCK_M, LAST_FIRST=right is not None)
    wide_batch, kv_head = batch.to(tl.int64), (head // group).to(tl.int64)
    wide_head = head.to(tl.int64)
    first_row = block * BLOCK_M
    offs_m = first_row + tl.arange(0, BLOCK_M)
    keep_row = offs_m < q_len
    offs_row = tl.minimum(offs_m, q_len - 1)
    last_row = tl.minimum(first_row + BLOCK_M, q_len) - 1

    q_ptr += wide_batch * q_stride_b + wide_head * q_stride_h + first_row.to(tl.int64) * q_stride_s
    q = load_tile(q_ptr + tile_offsets(BLOCK_M, BLOCK_D, q_stride_s, q_stride_d, WIDE), keep_row, HEAD_DIM, True)
    factor = tl.full([BLOCK_M], 1.0, tl.float32) * (scale * LOG2_E)
    if query_scale_ptr is not None:
        query_scale_ptr += wide_batch * query_scale_stride_b + wide_head * query_scale_stride_h
        factor *= tl.load(query_scale_ptr + offs_m.to(tl.int64) * query_scale_stride_s, mask=keep_row, other=0.0)
    q = tl.where((factor < 0)[:, None], -q, q)
    factor = tl.abs(factor)
    factor = tl.where(factor < TINY_FACTOR, TINY_FACTOR, factor)

    k_ptr += wide_batch * k_stride_b + kv_head * k_stride_h
    v_ptr += wide_batch * v_stride_b + kv_head * v_stride_h
    if key_scale_ptr is not None:
        key_scale_ptr += wide_batch * key_scale_stride_b + kv_head * key_scale_stride_h
    if mask_ptr is not None:
        mask_ptr += wide_batch * mask_stride_b + wide_head * mask_stride_h
    if seen_ptr is not None:
        seen_ptr += (wide_batch * (q_heads // group) + kv_head) * k_len

    running_max = tl.full([BLOCK_M], float("-inf"), tl.float32)
    running_sum = tl.zeros([BLOCK_M], tl.float32)
    accumulator = tl.zeros([BLOCK_M, BLOCK_DV], tl.float32)
    BOUNDED_BELOW: tl.constexpr = left is not None or key_ranges_ptr is not None
    lo, hi = row_range(offs_row, batch, q_len, k_len, left, right, key_lengths_ptr, key_ranges_ptr)
    touch_lo, touch_hi, full_start, full_end = key_blocks_of_rows(
        lo, hi, first_row, last_row, batch, q_len, k_len, left, right, key_lengths_ptr, key_ranges_ptr, mask_ptr,
        BLOCK_N,
    )  # fmt: skip
    accumulator, running_max, running_sum = _attend(
        accumulator, running_max, running_sum, q, factor,
        k_ptr, v_ptr, key_scale_ptr, seen_ptr, mask_ptr, offs_row, lo, hi, q_len, k_len,
        touch_lo, touch_hi, full_start, full_end,
        k_stride_s, k_stride_d, v_stride_s, v_stride_d, key_scale_stride_s, mask_stride_q, mask_stride_k,
        HEAD_DIM, VALUE_DIM, BLOCK_N, BOUNDED_BELOW, PRECISION, WIDE, MASKED=True,
    )  # fmt: skip
    if mask_ptr is None:
        accumulator, running_max, running_sum = _attend(
            accumulator, running_max, running_sum, q, factor,
            k_ptr, v_ptr, key_scale_ptr, seen_ptr, mask_ptr, offs_row, lo, hi, q_len, k_len,
            touch_lo, touch_hi, full_start, full_end,
            k_stride_s, k_stride_d, v_stride_s, v_stride_d, key_scale_stride_s, mask_stride_q, mask_stride_k,
            HEAD_DIM, VALUE_DIM, BLOCK_N, BOUNDED_BELOW, PRECISION, WIDE, MASKED=False,
        )  # fmt: skip

    empty = running_sum == 0.0
    out = accumulator / tl.where(empty, 1.0, running_sum)[:, None]
    lse = tl.where(empty, float("-inf"), (running_max + tl.log2(tl.where(empty, 1.0, running_sum))) * LN_2)
    row_base = (wide_batch * q_heads + wide_head) * q_len + first_row
    out_ptrs = out_ptr + row_base * VALUE_DIM + tile_offsets(BLOCK_M, BLOCK_DV, VALUE_DIM, 1, False)
    store_tile(out_ptrs, out, keep_row, VALUE_DIM)
    tl.store(lse_ptr + row_base + tl.arange(0, BLOCK_M), lse, mask=keep_row)
