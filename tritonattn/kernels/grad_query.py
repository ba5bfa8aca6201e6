"""Backward, first half: per-row terms that both passes need, and the gradients of q and query_scale."""

from __future__ import annotations

import triton
import triton.language as tl

from .primitives import (
    COUNTS,
    LENGTHS,
    LOG2_E,
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


@triton.jit(do_not_specialize=LENGTHS, do_not_specialize_on_alignment=COUNTS)
def attention_row_terms(
    out_ptr, d_out_ptr, lse_ptr, d_lse_ptr, query_scale_ptr,
    lse2_ptr, delta_ptr, factor_ptr, delta_factor_ptr,
    scale, q_len, terms_len, q_heads,
    d_out_stride_b, d_out_stride_h, d_out_stride_s, d_out_stride_d,
    query_scale_stride_b, query_scale_stride_h, query_scale_stride_s,
    VALUE_DIM: tl.constexpr, BLOCK_DV: tl.constexpr, BLOCK_M: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """Row terms of the softmax's derivative, for BLOCK_M rows of one (batch, head).

        lse2[i]         = lse[i] * log2(e), +inf for a row without keys, so that its probabilities come out as 0
        delta[i]        = sum_c out[i, c] * d_out[i, c] - d_lse[i]
        factor[i]       = scale * log2(e) * query_scale[i]          only with query_scale
        delta_factor[i] = delta[i] * factor[i]                      only with query_scale

    Grid: cdiv(terms_len, BLOCK_M) * B * Hq. out [B, Hq, Sq, Dv] and lse [B, Hq, Sq] contiguous, d_out any strides,
    d_lse fp32 [B, Hq, Sq] contiguous or None. Results fp32 [B, Hq, terms_len] contiguous, terms_len a multiple of
    BLOCK_M; rows from Sq on are as rows without keys, so that no reader needs a bound.
    """
    block, batch, head = program_position(terms_len, q_heads, BLOCK_M, LAST_FIRST=False)
    wide_batch, wide_head = batch.to(tl.int64), head.to(tl.int64)
    first_row = block * BLOCK_M
    offs_m = first_row + tl.arange(0, BLOCK_M)
    keep_row = offs_m < q_len
    row_base = (wide_batch * q_heads + wide_head) * q_len + first_row
    row_offsets = row_base + tl.arange(0, BLOCK_M)
    term_offsets = (wide_batch * q_heads + wide_head) * terms_len + offs_m

    lse = tl.load(lse_ptr + row_offsets, mask=keep_row, other=float("-inf"))
    live = lse != float("-inf")
    out = load_tile(
        out_ptr + row_base * VALUE_DIM + tile_offsets(BLOCK_M, BLOCK_DV, VALUE_DIM, 1, False), live, VALUE_DIM, True
    ).to(tl.float32)
    d_out_ptr += wide_batch * d_out_stride_b + wide_head * d_out_stride_h + first_row.to(tl.int64) * d_out_stride_s
    d_out = load_tile(
        d_out_ptr + tile_offsets(BLOCK_M, BLOCK_DV, d_out_stride_s, d_out_stride_d, WIDE), live, VALUE_DIM, True
    ).to(tl.float32)
    delta = tl.sum(out * d_out, 1)
    if d_lse_ptr is not None:
        delta -= tl.load(d_lse_ptr + row_offsets, mask=live, other=0.0)
    tl.store(lse2_ptr + term_offsets, tl.where(live, lse * LOG2_E, float("inf")))
    tl.store(delta_ptr + term_offsets, delta)
    if query_scale_ptr is not None:
        query_scale_ptr += wide_batch * query_scale_stride_b + wide_head * query_scale_stride_h
        query_scale = tl.load(query_scale_ptr + offs_m.to(tl.int64) * query_scale_stride_s, mask=live, other=0.0)
        factor = query_scale * (scale * LOG2_E)
        tl.store(factor_ptr + term_offsets, factor)
        tl.store(delta_factor_ptr + term_offsets, delta * factor)


@triton.jit
def _gather_query_gradient(
    accumulator, d_logit_sum, d_factor, mean_logit, q, d_out, factor, lse2, delta,
    k_ptr, v_ptr, key_scale_ptr, seen_ptr, mask_ptr, offs_row, lo, hi, q_len, k_len,
    touch_lo, touch_hi, full_start, full_end,
    k_stride_s, k_stride_d, v_stride_s, v_stride_d, key_scale_stride_s, mask_stride_q, mask_stride_k,
    HEAD_DIM: tl.constexpr, VALUE_DIM: tl.constexpr, BLOCK_N: tl.constexpr, BOUNDED_BELOW: tl.constexpr,
    WITH_FACTOR: tl.constexpr, PRECISION: tl.constexpr, WIDE: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """Add sum_j dS[i, j] * key_scale[j] * k[j] over the blocks of [full_start, full_end), or those around it if MASKED.

    WITH_FACTOR also adds up dS, dS * x and P * x in fp32, x the logit without the row's factor. The products are fma's
    with 0, which nothing fuses further.
    """
    start, end = full_start, full_end
    if MASKED:
        start, end = touch_lo // BLOCK_N * BLOCK_N, touch_hi - (full_end - full_start)
    k_offsets = tile_offsets(BLOCK_N, q.shape[1], k_stride_s, k_stride_d, WIDE)
    v_offsets = tile_offsets(BLOCK_N, d_out.shape[1], v_stride_s, v_stride_d, WIDE)
    for position in tl.range(start, end, BLOCK_N):
        start_n, offs_key, keep_key = keys_at(
            position, full_start, full_end, touch_lo, touch_hi, seen_ptr, BLOCK_N, MASKED
        )
        k = load_tile(k_ptr + start_n.to(tl.int64) * k_stride_s + k_offsets, keep_key, HEAD_DIM, MASKED)
        v = load_tile(v_ptr + start_n.to(tl.int64) * v_stride_s + v_offsets, keep_key, VALUE_DIM, MASKED)
        logits = tl.dot(q, k.T, input_precision=PRECISION)  # [BLOCK_M, BLOCK_N]
        if key_scale_ptr is not None:
            key_scale = load_key_scale(key_scale_ptr, offs_key, key_scale_stride_s, keep_key, MASKED)
            logits *= key_scale[None, :]
        probabilities = tl.exp2(scale_rows_add(logits, factor, -lse2))
        d_probabilities = tl.dot(d_out, v.T, input_precision=PRECISION)
        if MASKED:
            keep = visible_tile(
                offs_row, offs_key, lo, hi, mask_ptr, q_len, k_len, mask_stride_q, mask_stride_k, BOUNDED_BELOW
            )
            probabilities = tl.where(keep, probabilities, 0.0)
        d_logits = probabilities * (d_probabilities - delta[:, None])
        if WITH_FACTOR:
            zero = tl.zeros_like(logits)
            d_logits = tl.fma(probabilities, d_probabilities - delta[:, None], zero)
            d_logit_sum += tl.sum(d_logits, 1)
            d_factor += tl.sum(tl.fma(d_logits, logits, zero), 1)
            mean_logit += tl.sum(tl.fma(probabilities, logits, zero), 1)
        if key_scale_ptr is not None:
            d_logits *= key_scale[None, :]
        accumulator = tl.dot(d_logits.to(k.dtype), k, accumulator, input_precision=PRECISION)
    return accumulator, d_logit_sum, d_factor, mean_logit


@triton.jit(do_not_specialize=LENGTHS, do_not_specialize_on_alignment=COUNTS)
def attention_grad_query(
    q_ptr, k_ptr, v_ptr, d_out_ptr, d_lse_ptr, lse2_ptr, delta_ptr, factor_ptr, delta_factor_ptr,
    query_scale_ptr, key_scale_ptr, key_lengths_ptr, key_ranges_ptr, mask_ptr, seen_ptr, d_q_ptr, d_query_scale_ptr,
    scale, left, right, q_len, k_len, terms_len, q_heads, group,
    q_stride_b, q_stride_h, q_stride_s, q_stride_d, k_stride_b, k_stride_h, k_stride_s, k_stride_d,
    v_stride_b, v_stride_h, v_stride_s, v_stride_d, d_out_stride_b, d_out_stride_h, d_out_stride_s, d_out_stride_d,
    query_scale_stride_b, query_scale_stride_h, query_scale_stride_s,
    key_scale_stride_b, key_scale_stride_h, key_scale_stride_s,
    mask_stride_b, mask_stride_h, mask_stride_q, mask_stride_k,
    HEAD_DIM: tl.constexpr, VALUE_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, PRECISION: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """Gradients of q and query_scale for BLOCK_M rows of one (batch, head); arguments as in `attention_forward`.

        P[i, j]          = exp(logit[i, j] - lse[i])
        dS[i, j]         = P[i, j] * (d_out[i] . v[j] - delta[i])
        raw[i]           = sum_j dS[i, j] * key_scale[j] * k[j]
        d_q[i]           = scale * query_scale[i] * raw[i]
        d_query_scale[i] = scale * sum_j dS[i, j] * x[i, j]       x[i, j] = (q[i] . k[j]) * key_scale[j]

    lse2, delta, factor: see `attention_row_terms`; factor is None without query_scale. d_q [B, Hq, Sq, D] in q's dtype
    and d_query_scale fp32 [B, Hq, Sq] contiguous, every row written once; d_query_scale_ptr is None where not asked.

    d_query_scale equals scale * (q[i] . raw[i]), but that sums dS after rounding to 16 bits, and with it delta's error
    times the mean logit, which for sharp softmaxes passes the result. So dS stays in fp32; and since it must sum to
    d_lse over a row, the excess of its sum takes its share sum_j P * x out again, and corrects delta for the pass over
    the keys.
    """
    block, batch, head = program_position(q_len, q_heads, BLOCK_M, LAST_FIRST=right is not None)
    wide_batch, wide_head = batch.to(tl.int64), head.to(tl.int64)
    kv_head = (head // group).to(tl.int64)
    first_row = block * BLOCK_M
    offs_m = first_row + tl.arange(0, BLOCK_M)
    keep_row = offs_m < q_len
    offs_row = tl.minimum(offs_m, q_len - 1)
    last_row = tl.minimum(first_row + BLOCK_M, q_len) - 1
    row_base = (wide_batch * q_heads + wide_head) * q_len + first_row
    row_offsets = row_base + tl.arange(0, BLOCK_M)

    term_offsets = (wide_batch * q_heads + wide_head) * terms_len + offs_m
    lse2 = tl.load(lse2_ptr + term_offsets)
    delta = tl.load(delta_ptr + term_offsets)
    live = lse2 != float("inf")
    if factor_ptr is not None:
        factor = tl.load(factor_ptr + term_offsets)
    else:
        factor = tl.full([BLOCK_M], 1.0, tl.float32) * (scale * LOG2_E)
    q_ptr += wide_batch * q_stride_b + wide_head * q_stride_h + first_row.to(tl.int64) * q_stride_s
    q = load_tile(q_ptr + tile_offsets(BLOCK_M, BLOCK_D, q_stride_s, q_stride_d, WIDE), live, HEAD_DIM, True)
    d_out_ptr += wide_batch * d_out_stride_b + wide_head * d_out_stride_h + first_row.to(tl.int64) * d_out_stride_s
    d_out_offsets = tile_offsets(BLOCK_M, BLOCK_DV, d_out_stride_s, d_out_stride_d, WIDE)
    d_out = load_tile(d_out_ptr + d_out_offsets, live, VALUE_DIM, True)

    k_ptr += wide_batch * k_stride_b + kv_head * k_stride_h
    v_ptr += wide_batch * v_stride_b + kv_head * v_stride_h
    if key_scale_ptr is not None:
        key_scale_ptr += wide_batch * key_scale_stride_b + kv_head * key_scale_stride_h
    if mask_ptr is not None:
        mask_ptr += wide_batch * mask_stride_b + wide_head * mask_stride_h
    if seen_ptr is not None:
        seen_ptr += (wide_batch * (q_heads // group) + kv_head) * k_len

    raw = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    d_logit_sum = tl.zeros([BLOCK_M], tl.float32)
    d_factor = tl.zeros([BLOCK_M], tl.float32)
    mean_logit = tl.zeros([BLOCK_M], tl.float32)
    WITH_FACTOR: tl.constexpr = d_query_scale_ptr is not None
    BOUNDED_BELOW: tl.constexpr = left is not None or key_ranges_ptr is not None
    lo, hi = row_range(offs_row, batch, q_len, k_len, left, right, key_lengths_ptr, key_ranges_ptr)
    touch_lo, touch_hi, full_start, full_end = key_blocks_of_rows(
        lo, hi, first_row, last_row, batch, q_len, k_len, left, right, key_lengths_ptr, key_ranges_ptr, mask_ptr,
        BLOCK_N,
    )  # fmt: skip
    raw, d_logit_sum, d_factor, mean_logit = _gather_query_gradient(
        raw, d_logit_sum, d_factor, mean_logit, q, d_out, factor, lse2, delta,
        k_ptr, v_ptr, key_scale_ptr, seen_ptr, mask_ptr, offs_row, lo, hi, q_len, k_len,
        touch_lo, touch_hi, full_start, full_end,
        k_stride_s, k_stride_d, v_stride_s, v_stride_d, key_scale_stride_s, mask_stride_q, mask_stride_k,
        HEAD_DIM, VALUE_DIM, BLOCK_N, BOUNDED_BELOW, WITH_FACTOR, PRECISION, WIDE, MASKED=True,
    )  # fmt: skip
    if mask_ptr is None:
        raw, d_logit_sum, d_factor, mean_logit = _gather_query_gradient(
            raw, d_logit_sum, d_factor, mean_logit, q, d_out, factor, lse2, delta,
            k_ptr, v_ptr, key_scale_ptr, seen_ptr, mask_ptr, offs_row, lo, hi, q_len, k_len,
            touch_lo, touch_hi, full_start, full_end,
            k_stride_s, k_stride_d, v_stride_s, v_stride_d, key_scale_stride_s, mask_stride_q, mask_stride_k,
            HEAD_DIM, VALUE_DIM, BLOCK_N, BOUNDED_BELOW, WITH_FACTOR, PRECISION, WIDE, MASKED=False,
        )  # fmt: skip

    d_q = raw * scale
    if query_scale_ptr is not None:
        query_scale_ptr += wide_batch * query_scale_stride_b + wide_head * query_scale_stride_h
        query_scale = tl.load(query_scale_ptr + offs_m.to(tl.int64) * query_scale_stride_s, mask=live, other=0.0)
        if d_query_scale_ptr is not None:
            excess = d_logit_sum
            if d_lse_ptr is not None:
                excess -= tl.load(d_lse_ptr + row_offsets, mask=live, other=0.0)
            tl.store(d_query_scale_ptr + row_offsets, tl.fma(-excess, mean_logit, d_factor) * scale, mask=keep_row)
            tl.store(delta_factor_ptr + term_offsets, (delta + excess) * factor)
        d_q = d_q * query_scale[:, None]
    d_q_ptrs = d_q_ptr + row_base * HEAD_DIM + tile_offsets(BLOCK_M, BLOCK_D, HEAD_DIM, 1, False)
    store_tile(d_q_ptrs, d_q, keep_row, HEAD_DIM)
