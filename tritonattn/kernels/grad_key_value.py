"""Backward, the pass over keys: gradients of k, v and key_scale, a block of keys at a time, without atomics."""

from __future__ import annotations

import triton
import triton.language as tl

from .primitives import (
    COUNTS,
    LENGTHS,
    LN_2,
    LOG2_E,
    dropout_keeps,
    load_block,
    load_mask,
    load_term,
    load_tile,
    program_position,
    row_blocks_of_keys,
    scale_columns_add,
    sequence_bounds,
    skip_gap,
    soft_cap,
    soft_cap_slope,
    store_tile,
    terms_offset,
    tile_offsets,
)


@triton.jit
def _gather_key_value_gradient(
    d_k, d_v, k, v, key_scale, scale, softcap, q_ptr, d_out_ptr, q_descriptor, d_out_descriptor,
    terms_ptr, factor_size, mask_ptr, key_ranges_ptr, dropout_ptr, keep_from, keep_scale,
    offs_key, first_row, last_row, q_len, k_len, start, full_start, full_end, end,
    batch, head, batch_head, first_packed_row, first_packed_key,
    q_stride_s, q_stride_d, d_out_stride_s, d_out_stride_d, mask_stride_q, mask_stride_k,
    HEAD_DIM: tl.constexpr, VALUE_DIM: tl.constexpr, BLOCK_M: tl.constexpr,
    BOUNDED_ABOVE: tl.constexpr, SPLIT_TERMS: tl.constexpr, PRECISION: tl.constexpr, WIDE: tl.constexpr,
    MASKED: tl.constexpr,
):  # fmt: skip
    """Add to d_k (without key_scale and constants) and d_v the row blocks of [full_start, full_end), or, where MASKED,
    those of [start, end) around it. Tiles are [keys, rows]; key j is visible to the rows first_row[j] .. last_row[j].
    """
    loop_start, loop_end = full_start, full_end
    if MASKED:
        loop_start, loop_end = start, end - (full_end - full_start)
    q_offsets = tile_offsets(BLOCK_M, k.shape[1], q_stride_s, q_stride_d, WIDE)
    d_out_offsets = tile_offsets(BLOCK_M, v.shape[1], d_out_stride_s, d_out_stride_d, WIDE)
    one = tl.full([BLOCK_M], 1.0, tl.float32)
    # Carried along: addresses made from the position would make the loop's counter one of 64 bits.
    term_ptrs = terms_ptr + 2 * (loop_start + tl.arange(0, BLOCK_M))
    for position in tl.range(loop_start, loop_end, BLOCK_M):
        start_m = position  # a loop's own variable must stay as it is: triton 3.4 reads it wherever it was written
        if MASKED:
            start_m = skip_gap(position, full_start, full_end)
            term_ptrs = terms_ptr + 2 * (start_m + tl.arange(0, BLOCK_M))
        start_m = tl.multiple_of(start_m, BLOCK_M)
        offs_m = start_m + tl.arange(0, BLOCK_M)
        exponent_term, factor = load_term(term_ptrs, scale * LOG2_E, SPLIT_TERMS)
        keep_row = exponent_term != float("-inf")
        q = load_block(
            q_descriptor, q_ptr + start_m.to(tl.int64) * q_stride_s + q_offsets,
            batch, head, first_packed_row + start_m, keep_row, HEAD_DIM, MASKED,
        )  # fmt: skip
        d_out = load_block(
            d_out_descriptor, d_out_ptr + start_m.to(tl.int64) * d_out_stride_s + d_out_offsets,
            batch, head, first_packed_row + start_m, keep_row, VALUE_DIM, MASKED,
        )  # fmt: skip
        logits = tl.dot(k, q.T, input_precision=PRECISION)  # [BLOCK_N, BLOCK_M]
        if key_scale is not None:
            logits *= key_scale[:, None]
        if softcap is None:
            exponent = scale_columns_add(logits, factor, exponent_term)
        else:
            capped = soft_cap(scale_columns_add(logits, factor, tl.zeros_like(exponent_term)), softcap)
            exponent = capped + exponent_term[None, :]
        probabilities = tl.exp2(exponent)
        if MASKED:
            keep = offs_m[None, :] >= first_row[:, None]
            if BOUNDED_ABOVE:
                keep = keep & (offs_m[None, :] <= last_row[:, None])
            if key_ranges_ptr is not None:
                range_ptrs = key_ranges_ptr + offs_m.to(tl.int64) * 2
                lo = tl.load(range_ptrs, mask=keep_row, other=0)
                hi = tl.load(range_ptrs + 1, mask=keep_row, other=0)
                keep = keep & (offs_key[:, None] >= lo[None, :]) & (offs_key[:, None] < hi[None, :])
            if mask_ptr is not None:
                keep = keep & load_mask(mask_ptr, offs_key, offs_m, k_len, q_len, mask_stride_k, mask_stride_q)
            probabilities = tl.where(keep, probabilities, 0.0)
        d_probabilities = tl.dot(v, d_out.T, input_precision=PRECISION)
        weights = probabilities
        if dropout_ptr is not None:
            kept = dropout_keeps(
                dropout_ptr, keep_from, batch_head, (first_packed_row + offs_m)[None, :],
                (first_packed_key + offs_key)[:, None],
            )  # fmt: skip
            weights = tl.where(kept, probabilities, 0.0)
            d_probabilities = tl.where(kept, d_probabilities * keep_scale, 0.0)
        gradient_term, gradient_factor = load_term(term_ptrs + 1, one, SPLIT_TERMS)
        d_v = tl.dot(weights.to(d_out.dtype), d_out, d_v, input_precision=PRECISION)
        if factor_size is not None:
            gradient_factor *= factor_size
            gradient_term *= factor_size
        d_logits = probabilities * scale_columns_add(d_probabilities, gradient_factor, gradient_term)
        if softcap is not None:
            d_logits *= soft_cap_slope(capped, softcap)
        d_k = tl.dot(d_logits.to(q.dtype), q, d_k, input_precision=PRECISION)
        term_ptrs += 2 * BLOCK_M
    return d_k, d_v


@triton.jit(do_not_specialize=LENGTHS, do_not_specialize_on_alignment=COUNTS)
def attention_grad_key_value(
    q_descriptor, d_out_descriptor, q_ptr, k_ptr, v_ptr, d_out_ptr,
    terms_ptr, factor_size_ptr, key_scale_ptr,
    key_lengths_ptr, key_ranges_ptr, row_bounds_ptr, mask_ptr, seen_ptr, q_starts_ptr, k_starts_ptr, dropout_ptr,
    d_k_ptr, d_v_ptr, d_key_scale_ptr,
    scale, softcap, keep_from, keep_scale, left, right, q_len, k_len, terms_len, q_heads, group,
    first_head, first_member,
    q_stride_b, q_stride_h, q_stride_s, q_stride_d, k_stride_b, k_stride_h, k_stride_s, k_stride_d,
    v_stride_b, v_stride_h, v_stride_s, v_stride_d, d_out_stride_b, d_out_stride_h, d_out_stride_s, d_out_stride_d,
    key_scale_stride_b, key_scale_stride_h, key_scale_stride_s,
    mask_stride_b, mask_stride_h, mask_stride_q, mask_stride_k,
    HEAD_DIM: tl.constexpr, VALUE_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, SPLIT_TERMS: tl.constexpr, PRECISION: tl.constexpr,
    WIDE: tl.constexpr,
):  # fmt: skip
    """Gradients of k, v and key_scale for BLOCK_N keys of one (batch or sequence, kv head); names as in
    `attention_grad_query`.

        d_v[j]         = sum_i keep[i, j] * keep_scale * P[i, j] * d_out[i]
        raw[j]         = scale * sum_i dX[i, j] * query_scale[i] * q[i]      over the rows of all heads of the group
        d_k[j]         = key_scale[j] * raw[j]
        d_key_scale[j] = k[j] . raw[j]                                       never divided by key_scale, which may be 0

    Grid: (blocks of the longest Sk, Hkv, members). Sums run in one fixed order inside a program: bitwise repeatable.

    *_descriptor     tensor descriptors of q and d_out with blocks [1, 1, BLOCK_M, BLOCK_D or BLOCK_DV], or None
    terms            of `attention_row_terms`: with query_scale, dS * factor is one fma, and log2(e) is taken out once
                     at the end
    factor_size      fp32 [B, Hkv] or None: the largest |factor| of the group, never 0. dS * factor / factor_size is
                     what is rounded to 16 bits, so that a small factor does not push it below fp16's range
    row_bounds       int32 [B, cdiv(Sk, BLOCK_N), 2] with key_ranges: `primitives.row_blocks_of_keys`
    d_k, d_v         [B, Hkv, Sk, D] and [B, Hkv, Sk, Dv] contiguous; d_key_scale fp32 [B, Hkv, Sk] contiguous or None
    """
    kv_heads = q_heads // group
    block, kv_head, member = program_position(first_head, first_member, LAST_FIRST=False)
    keys = k_len
    batch, first_packed_row, q_len, first_packed_key, k_len = sequence_bounds(
        member, q_len, k_len, q_starts_ptr, k_starts_ptr
    )
    first_key = block * BLOCK_N
    if q_starts_ptr is not None:
        if first_key >= k_len:
            return
    wide_batch, wide_head = batch.to(tl.int64), kv_head.to(tl.int64)
    last_key = tl.minimum(first_key + BLOCK_N, k_len) - 1
    offs_n = first_key + tl.arange(0, BLOCK_N)
    keep_key = offs_n < k_len
    own_row = offs_n - (k_len - q_len)
    first_row = tl.zeros([BLOCK_N], tl.int32)
    last_row = first_row
    load_key = keep_key
    if right is not None:
        first_row = own_row - right
    if left is not None:
        last_row = own_row + left
        load_key = load_key & (last_row >= 0)
    if key_lengths_ptr is not None:
        unpadded = offs_n < tl.load(key_lengths_ptr + batch)
        first_row = tl.where(unpadded, first_row, q_len)
        load_key = load_key & unpadded
    if key_ranges_ptr is not None:
        key_ranges_ptr += batch.to(tl.int64) * q_len * 2
    if seen_ptr is not None:
        seen_ptr += (wide_batch * kv_heads + wide_head) * k_len
        load_key = load_key & (tl.load(seen_ptr + offs_n, mask=load_key, other=0) != 0)
    if row_bounds_ptr is not None:
        row_bounds_ptr += (wide_batch * tl.cdiv(k_len, BLOCK_N) + block) * 2
    start, full_start, full_end, end = row_blocks_of_keys(
        first_key, last_key, batch, q_len, k_len, left, right, key_lengths_ptr, row_bounds_ptr, mask_ptr, BLOCK_M
    )

    memory_row, memory_key = first_packed_row.to(tl.int64), (first_packed_key + first_key).to(tl.int64)
    k_ptr += wide_batch * k_stride_b + wide_head * k_stride_h + memory_key * k_stride_s
    k_ptrs = k_ptr + tile_offsets(BLOCK_N, BLOCK_D, k_stride_s, k_stride_d, WIDE)
    k = load_tile(k_ptrs, load_key, HEAD_DIM, True)
    v_ptr += wide_batch * v_stride_b + wide_head * v_stride_h + memory_key * v_stride_s
    v = load_tile(v_ptr + tile_offsets(BLOCK_N, BLOCK_DV, v_stride_s, v_stride_d, WIDE), load_key, VALUE_DIM, True)
    key_scale = None
    if key_scale_ptr is not None:
        key_scale_ptr += wide_batch * key_scale_stride_b + wide_head * key_scale_stride_h
        scale_offsets = (memory_key + tl.arange(0, BLOCK_N)) * key_scale_stride_s
        key_scale = tl.load(key_scale_ptr + scale_offsets, mask=load_key, other=0.0)
    factor_size = None
    if factor_size_ptr is not None:
        factor_size = 1.0 / tl.load(factor_size_ptr + batch * kv_heads + kv_head)

    # Masks hold registers: masked steps take half of a wide block.
    MASKED_STEP: tl.constexpr = BLOCK_M // 2 if BLOCK_M >= 64 else BLOCK_M
    d_k = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    d_v = tl.zeros([BLOCK_N, BLOCK_DV], tl.float32)
    for index in range(0, group):
        head = kv_head * group + index
        head_q_ptr = q_ptr + wide_batch * q_stride_b + head.to(tl.int64) * q_stride_h + memory_row * q_stride_s
        head_d_out_ptr = d_out_ptr + wide_batch * d_out_stride_b + head.to(tl.int64) * d_out_stride_h
        head_d_out_ptr += memory_row * d_out_stride_s
        terms = terms_offset(batch, head, q_heads, terms_len, member, first_packed_row, q_starts_ptr)
        head_mask_ptr = None
        if mask_ptr is not None:
            head_mask_ptr = mask_ptr + wide_batch * mask_stride_b + head.to(tl.int64) * mask_stride_h
        for walk in tl.static_range(2):  # the blocks that need a mask, then the others
            if walk == 0 or (mask_ptr is None and key_ranges_ptr is None):
                d_k, d_v = _gather_key_value_gradient(
                    d_k, d_v, k, v, key_scale, scale, softcap, head_q_ptr, head_d_out_ptr, q_descriptor,
                    d_out_descriptor, terms_ptr + 2 * terms, factor_size,
                    head_mask_ptr, key_ranges_ptr, dropout_ptr, keep_from, keep_scale,
                    offs_n, first_row, last_row, q_len, k_len, start, full_start, full_end, end,
                    batch, head, batch * q_heads + head, first_packed_row, first_packed_key,
                    q_stride_s, q_stride_d, d_out_stride_s, d_out_stride_d, mask_stride_q, mask_stride_k,
                    HEAD_DIM, VALUE_DIM, MASKED_STEP if walk == 0 else BLOCK_M, left is not None,
                    SPLIT_TERMS, PRECISION, WIDE, walk == 0,
                )  # fmt: skip

    if terms_ptr.dtype.element_ty == tl.float32:
        d_k *= scale
    elif factor_size_ptr is None:
        d_k *= LN_2
    else:
        d_k *= LN_2 / factor_size
    if dropout_ptr is not None:
        d_v *= keep_scale
    key_base = (wide_batch * kv_heads + wide_head) * keys + memory_key
    if key_scale_ptr is not None:
        if d_key_scale_ptr is not None:
            # Loaded again, by a policy of its own so that the compiler does not take both loads for one: keys that
            # outlive the loop are held in registers all through it, and in fp32 spill.
            k = load_tile(k_ptrs, load_key, HEAD_DIM, True, LAST=True)
            d_key_scale = tl.sum(k.to(tl.float32) * d_k, 1)
            tl.store(d_key_scale_ptr + key_base + tl.arange(0, BLOCK_N), d_key_scale, mask=keep_key)
        d_k *= key_scale[:, None]
    d_k_ptrs = d_k_ptr + key_base * HEAD_DIM + tile_offsets(BLOCK_N, BLOCK_D, HEAD_DIM, 1, False)
    store_tile(d_k_ptrs, d_k, keep_key, HEAD_DIM)
    d_v_ptrs = d_v_ptr + key_base * VALUE_DIM + tile_offsets(BLOCK_N, BLOCK_DV, VALUE_DIM, 1, False)
    store_tile(d_v_ptrs, d_v, keep_key, VALUE_DIM)
