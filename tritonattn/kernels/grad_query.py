"""Backward, the pass over rows: gradients of q and query_scale."""

from __future__ import annotations

import triton
import triton.language as tl

from .primitives import (
    COUNTS,
    LENGTHS,
    LOG2_E,
    dropout_keeps,
    key_blocks_of_rows,
    keys_at,
    load_block,
    load_term,
    load_tile,
    load_vector,
    partial_sums,
    program_position,
    row_range,
    scale_rows_add,
    sequence_bounds,
    soft_cap,
    soft_cap_slope,
    store_term,
    store_tile,
    terms_offset,
    tile_offsets,
    visible_tile,
)

# Few keys, over which a block of rows walks twice. Among more, some row's exact gradient is far larger than an error.
FEW_KEYS = tl.constexpr(64)


@triton.jit
def _gather_query_gradient(
    accumulator, d_logit_sum, d_factor, mean_logit, q, d_out, factor, exponent_term, delta, softcap,
    k_ptr, v_ptr, k_descriptor, v_descriptor, key_scale_ptr, key_size, seen_ptr, mask_ptr, dropout_ptr, keep_from,
    keep_scale, offs_row, lo, hi, q_len, k_len, touch_lo, touch_hi, full_start, full_end,
    batch, kv_head, batch_head, first_packed_row, first_packed_key,
    k_stride_s, k_stride_d, v_stride_s, v_stride_d, key_scale_stride_s, mask_stride_q, mask_stride_k,
    HEAD_DIM: tl.constexpr, VALUE_DIM: tl.constexpr, BLOCK_N: tl.constexpr, BOUNDED_BELOW: tl.constexpr,
    WITH_SUM: tl.constexpr, WITH_FACTOR: tl.constexpr, PRECISION: tl.constexpr, WIDE: tl.constexpr,
    MASKED: tl.constexpr,
):  # fmt: skip
    """Add sum_j dX[i, j] * key_scale[j] * k[j] over the blocks of [full_start, full_end), or around it if MASKED.

    WITH_SUM also adds up dS, WITH_FACTOR dX * x and P * dz/dx * x, all in fp32, x the logit without the row's factor.
    These products are fma's with 0, which nothing fuses further.
    """
    COLUMNS: tl.constexpr = d_factor.shape[1]
    start, end = full_start, full_end
    if MASKED:
        start, end = touch_lo // BLOCK_N * BLOCK_N, touch_hi - (full_end - full_start)
    k_offsets = tile_offsets(BLOCK_N, q.shape[1], k_stride_s, k_stride_d, WIDE)
    v_offsets = tile_offsets(BLOCK_N, d_out.shape[1], v_stride_s, v_stride_d, WIDE)
    scale_ptrs = key_scale_ptr
    if key_scale_ptr is not None:
        # Carried along: addresses made from the position would make the loop's counter one of 64 bits.
        key_scale_stride_s = tl.cast(key_scale_stride_s, tl.int64)
        scale_ptrs += (start + tl.arange(0, BLOCK_N)) * key_scale_stride_s
    for position in tl.range(start, end, BLOCK_N):
        start_n, offs_key, keep_key = keys_at(
            position, full_start, full_end, touch_lo, touch_hi, seen_ptr, BLOCK_N, MASKED
        )
        k = load_block(
            k_descriptor, k_ptr + start_n.to(tl.int64) * k_stride_s + k_offsets,
            batch, kv_head, first_packed_key + start_n, keep_key, HEAD_DIM, MASKED,
        )  # fmt: skip
        v = load_block(
            v_descriptor, v_ptr + start_n.to(tl.int64) * v_stride_s + v_offsets,
            batch, kv_head, first_packed_key + start_n, keep_key, VALUE_DIM, MASKED,
        )  # fmt: skip
        logits = tl.dot(q, k.T, input_precision=PRECISION)  # [BLOCK_M, BLOCK_N]
        if key_scale_ptr is not None:
            if MASKED:
                scale_ptrs = key_scale_ptr + offs_key * key_scale_stride_s
            key_scale = load_vector(scale_ptrs, keep_key, MASKED)
            scale_ptrs += BLOCK_N * key_scale_stride_s
            logits *= key_scale[None, :]
        if softcap is None:
            exponent = scale_rows_add(logits, factor, exponent_term)
        else:
            capped = soft_cap(logits * factor[:, None], softcap)
            exponent = capped + exponent_term[:, None]
        probabilities = tl.exp2(exponent)
        d_probabilities = tl.dot(d_out, v.T, input_precision=PRECISION)
        if MASKED:
            keep = visible_tile(
                offs_row, offs_key, lo, hi, mask_ptr, q_len, k_len, mask_stride_q, mask_stride_k, BOUNDED_BELOW
            )
            probabilities = tl.where(keep, probabilities, 0.0)
        if dropout_ptr is not None:
            kept = dropout_keeps(
                dropout_ptr, keep_from, batch_head, (first_packed_row + offs_row)[:, None],
                (first_packed_key + offs_key)[None, :],
            )  # fmt: skip
            d_probabilities = tl.where(kept, d_probabilities * keep_scale, 0.0)
        zero = tl.zeros_like(logits)
        d_logits = tl.fma(probabilities, d_probabilities - delta[:, None], zero)
        if WITH_SUM:
            d_logit_sum += partial_sums(d_logits, COLUMNS)
        if softcap is not None:
            slope = soft_cap_slope(capped, softcap)
            d_logits *= slope
            probabilities *= slope
        if WITH_FACTOR:
            d_factor += partial_sums(tl.fma(d_logits, logits, zero), COLUMNS)
            mean_logit += partial_sums(tl.fma(probabilities, logits, zero), COLUMNS)
        if key_scale_ptr is not None:
            if key_size is not None:
                key_scale *= 1.0 / key_size
            d_logits *= key_scale[None, :]
        accumulator = tl.dot(d_logits.to(k.dtype), k, accumulator, input_precision=PRECISION)
    return accumulator, d_logit_sum, d_factor, mean_logit


@triton.jit
def _excess(d_logit_sum, d_lse_ptr, d_sinks_ptr, row_offsets, live):
    """sum_j dS[i, j] - (d_lse[i] - d_sinks[i]): minus the error of delta[i]."""
    excess = tl.sum(d_logit_sum, 1)
    if d_lse_ptr is not None:
        excess -= tl.load(d_lse_ptr + row_offsets, mask=live, other=0.0)
    if d_sinks_ptr is not None:
        excess += tl.load(d_sinks_ptr + row_offsets, mask=live, other=0.0)
    return excess


@triton.jit(do_not_specialize=LENGTHS, do_not_specialize_on_alignment=COUNTS)
def attention_grad_query(
    k_descriptor, v_descriptor, q_ptr, k_ptr, v_ptr, d_out_ptr, d_lse_ptr, d_sinks_ptr, key_size_ptr,
    terms_ptr, delta_ptr, query_scale_ptr, key_scale_ptr,
    key_lengths_ptr, key_ranges_ptr, mask_ptr, seen_ptr, q_starts_ptr, k_starts_ptr, dropout_ptr,
    d_q_ptr, d_query_scale_ptr,
    scale, softcap, keep_from, keep_scale, left, right, q_len, k_len, terms_len, q_heads, group,
    first_head, first_member,
    q_stride_b, q_stride_h, q_stride_s, q_stride_d, k_stride_b, k_stride_h, k_stride_s, k_stride_d,
    v_stride_b, v_stride_h, v_stride_s, v_stride_d, d_out_stride_b, d_out_stride_h, d_out_stride_s, d_out_stride_d,
    query_scale_stride_b, query_scale_stride_h, query_scale_stride_s,
    key_scale_stride_b, key_scale_stride_h, key_scale_stride_s,
    mask_stride_b, mask_stride_h, mask_stride_q, mask_stride_k,
    HEAD_DIM: tl.constexpr, VALUE_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, SUM_COLUMNS: tl.constexpr, CORRECT_DELTA: tl.constexpr,
    PRECISION: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """Gradients of q and query_scale for BLOCK_M rows of one (batch or sequence, head), as `attention_forward`.

        P[i, j]          = exp(z[i, j]) / total[i]
        dS[i, j]         = P[i, j] * (keep[i, j] * keep_scale * (d_out[i] . v[j]) - delta[i])
        dX[i, j]         = dS[i, j] * dz/dx,  dz/dx = 1 - (z[i, j] / softcap)^2
        raw[i]           = sum_j dX[i, j] * key_scale[j] * k[j]
        d_q[i]           = scale * query_scale[i] * raw[i]
        d_query_scale[i] = scale * sum_j dX[i, j] * (q[i] . k[j]) * key_scale[j]

    Row terms and d_sinks: see `attention_row_terms`. d_q [B, Hq, Sq, D] in q's dtype and d_query_scale fp32 [B, Hq, Sq]
    contiguous, every row written once; d_query_scale_ptr is None where not asked.

    key_size     fp32 [B, Hkv] or None: the largest |key_scale|, never 0. dX * key_scale / key_size is what is rounded
                 to 16 bits, so that no size of the key scales pushes it out of fp16's range

    d_query_scale equals scale * (q[i] . raw[i]), but that sums dX after rounding to 16 bits, and with it delta's error
    times the mean logit, which for sharp softmaxes passes the result. So dX stays in fp32. And since dS must sum over a
    row to d_lse - d_sinks, the excess of its sum is delta's error: it takes its share of the gradient
    out again, and corrects delta for the pass over the keys. CORRECT_DELTA does that without d_query_scale too, and
    takes d_q of few keys by the corrected delta: of a single key dP - delta leaves nothing but their errors.
    """
    block, head, member = program_position(first_head, first_member, LAST_FIRST=right is not None)
    rows = q_len
    batch, first_packed_row, q_len, first_packed_key, k_len = sequence_bounds(
        member, q_len, k_len, q_starts_ptr, k_starts_ptr
    )
    first_row = block * BLOCK_M
    if q_starts_ptr is not None:
        if first_row >= q_len:
            return
    wide_batch, wide_head, kv_head = batch.to(tl.int64), head.to(tl.int64), head // group
    offs_m = first_row + tl.arange(0, BLOCK_M)
    keep_row = offs_m < q_len
    offs_row = tl.minimum(offs_m, q_len - 1)
    last_row = tl.minimum(first_row + BLOCK_M, q_len) - 1
    memory_row, memory_key = (first_packed_row + first_row).to(tl.int64), first_packed_key.to(tl.int64)
    row_base = (wide_batch * q_heads + wide_head) * rows + memory_row
    row_offsets = row_base + tl.arange(0, BLOCK_M)

    term_offsets = terms_offset(batch, head, q_heads, terms_len, member, first_packed_row, q_starts_ptr) + offs_m
    factor = tl.full([BLOCK_M], 1.0, tl.float32) * (scale * LOG2_E)
    exponent_term, factor = load_term(terms_ptr + 2 * term_offsets, factor, SPLIT=False)
    delta = tl.load(delta_ptr + term_offsets)
    live = exponent_term != float("-inf")
    q_ptr += wide_batch * q_stride_b + wide_head * q_stride_h + memory_row * q_stride_s
    q = load_tile(q_ptr + tile_offsets(BLOCK_M, BLOCK_D, q_stride_s, q_stride_d, WIDE), live, HEAD_DIM, True)
    d_out_ptr += wide_batch * d_out_stride_b + wide_head * d_out_stride_h + memory_row * d_out_stride_s
    d_out_offsets = tile_offsets(BLOCK_M, BLOCK_DV, d_out_stride_s, d_out_stride_d, WIDE)
    d_out = load_tile(d_out_ptr + d_out_offsets, live, VALUE_DIM, True)

    k_ptr += wide_batch * k_stride_b + kv_head.to(tl.int64) * k_stride_h + memory_key * k_stride_s
    v_ptr += wide_batch * v_stride_b + kv_head.to(tl.int64) * v_stride_h + memory_key * v_stride_s
    if key_scale_ptr is not None:
        key_scale_ptr += wide_batch * key_scale_stride_b + kv_head.to(tl.int64) * key_scale_stride_h
        key_scale_ptr += memory_key * key_scale_stride_s
    key_size = None
    if key_size_ptr is not None:
        key_size = tl.load(key_size_ptr + batch * (q_heads // group) + kv_head)
    if mask_ptr is not None:
        mask_ptr += wide_batch * mask_stride_b + wide_head * mask_stride_h
    if seen_ptr is not None:
        seen_ptr += (wide_batch * (q_heads // group) + kv_head) * k_len

    raw = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    d_logit_sum = tl.zeros([BLOCK_M, SUM_COLUMNS], tl.float32)
    d_factor = tl.zeros([BLOCK_M, SUM_COLUMNS], tl.float32)
    mean_logit = tl.zeros([BLOCK_M, SUM_COLUMNS], tl.float32)
    # Masks hold registers: masked steps take half of a wide block.
    MASKED_STEP: tl.constexpr = BLOCK_N // 2 if BLOCK_N >= 64 else BLOCK_N
    BOUNDED_BELOW: tl.constexpr = left is not None or key_ranges_ptr is not None
    lo, hi = row_range(offs_row, batch, q_len, k_len, left, right, key_lengths_ptr, key_ranges_ptr)
    touch_lo, touch_hi, full_start, full_end = key_blocks_of_rows(
        lo, hi, first_row, last_row, batch, q_len, k_len, left, right, key_lengths_ptr, key_ranges_ptr, mask_ptr,
        BLOCK_N,
    )  # fmt: skip
    WITH_FACTOR: tl.constexpr = d_query_scale_ptr is not None
    WITH_SUM: tl.constexpr = CORRECT_DELTA or WITH_FACTOR
    for walk in tl.static_range(3):  # the blocks that need a mask, the others, and few keys again
        if walk == 2 and WITH_SUM:
            excess = _excess(d_logit_sum, d_lse_ptr, d_sinks_ptr, row_offsets, live)
            delta += excess
        if walk == 2 and CORRECT_DELTA:
            are_few = touch_hi - touch_lo <= FEW_KEYS
            raw = tl.where(are_few, 0.0, raw)
            touch_hi = tl.where(are_few, touch_hi, 0)
            full_end = full_start
        if walk == 0 or (walk == 1 and mask_ptr is None) or (walk == 2 and CORRECT_DELTA):
            raw, d_logit_sum, d_factor, mean_logit = _gather_query_gradient(
                raw, d_logit_sum, d_factor, mean_logit, q, d_out, factor, exponent_term, delta, softcap,
                k_ptr, v_ptr, k_descriptor, v_descriptor, key_scale_ptr, key_size, seen_ptr, mask_ptr, dropout_ptr,
                keep_from, keep_scale, offs_row, lo, hi, q_len, k_len, touch_lo, touch_hi, full_start, full_end,
                batch, kv_head, batch * q_heads + head, first_packed_row, first_packed_key,
                k_stride_s, k_stride_d, v_stride_s, v_stride_d, key_scale_stride_s, mask_stride_q, mask_stride_k,
                HEAD_DIM, VALUE_DIM, BLOCK_N if walk == 1 else MASKED_STEP, BOUNDED_BELOW,
                WITH_SUM and walk < 2, WITH_FACTOR and walk < 2, PRECISION, WIDE, walk != 1,
            )  # fmt: skip

    d_q = raw * scale
    if key_size is not None:
        d_q *= key_size
    if query_scale_ptr is not None:
        query_scale_ptr += wide_batch * query_scale_stride_b + wide_head * query_scale_stride_h
        scale_offsets = (memory_row + tl.arange(0, BLOCK_M)) * query_scale_stride_s
        d_q *= tl.load(query_scale_ptr + scale_offsets, mask=live, other=0.0)[:, None]
    if WITH_FACTOR:
        d_query_scale = tl.fma(-excess, tl.sum(mean_logit, 1), tl.sum(d_factor, 1)) * scale
        tl.store(d_query_scale_ptr + row_offsets, d_query_scale, mask=keep_row)
    if WITH_SUM:
        gradient_term = -delta
        if query_scale_ptr is not None:
            gradient_term *= factor
        store_term(terms_ptr + 2 * term_offsets + 1, gradient_term, factor, keep_row)
    d_q_ptrs = d_q_ptr + row_base * HEAD_DIM + tile_offsets(BLOCK_M, BLOCK_D, HEAD_DIM, 1, False)
    store_tile(d_q_ptrs, d_q, keep_row, HEAD_DIM)
