"""Forward kernel: output, log-sum-exp, largest logit and entropy of a block of query rows."""

from __future__ import annotations

import triton
import triton.language as tl

from .primitives import (
    COUNTS,
    LENGTHS,
    LN_2,
    LOG2_E,
    TINY,
    dropout_keeps,
    key_blocks_of_rows,
    keys_at,
    load_block,
    load_signed,
    load_vector,
    partial_sums,
    program_position,
    row_range,
    scale_rows_add,
    sequence_bounds,
    soft_cap,
    store_tile,
    tile_offsets,
    visible_tile,
)


@triton.jit
def online_softmax(
    logits, keep, factor, softcap, running_max, running_sum, running_spread,
    MASKED: tl.constexpr, ENTROPY: tl.constexpr,
):  # fmt: skip
    """One step: (probabilities, decay, running_max, running_sum, running_spread), all relative to the new maximum.

    logits [BLOCK_M, BLOCK_N] without factor >= 0; keep says which are visible where MASKED. The running maximum is that
    of the uncapped logits; the capped one, the shift, is subtracted. Spread is sum_j exp(z_j - shift) (z_j - shift).
    Sum and spread are `partial_sums`, [BLOCK_M, columns].
    """
    COLUMNS: tl.constexpr = running_sum.shape[1]
    if MASKED:
        logits = tl.where(keep, logits, float("-inf"))
    block_max = tl.maximum(running_max, tl.max(logits, 1) * factor)
    if softcap is None:
        previous, shift = running_max, block_max
        if MASKED:
            shift = tl.where(block_max == float("-inf"), 0.0, block_max)
        exponent = scale_rows_add(logits, factor, -shift)
    else:
        previous, shift = soft_cap(running_max, softcap), soft_cap(block_max, softcap)
        exponent = soft_cap(logits * factor[:, None], softcap) - shift[:, None]
        if MASKED:
            exponent = tl.where(keep, exponent, float("-inf"))
    probabilities = tl.exp2(exponent)
    decay = tl.exp2(previous - shift)
    decays = tl.broadcast_to(decay[:, None], running_sum.shape)
    if ENTROPY:
        if MASKED:
            exponent = tl.where(keep, exponent, 0.0)
        moved = tl.where(running_sum > 0.0, (previous - shift)[:, None], 0.0)
        moved = tl.fma(moved, running_sum, running_spread)
        running_spread = tl.fma(moved, decays, partial_sums(probabilities * exponent, COLUMNS))
    running_sum = tl.fma(running_sum, decays, partial_sums(probabilities, COLUMNS))
    return probabilities, decay, block_max, running_sum, running_spread


@triton.jit
def softmax_results(running_max, row_sum, row_spread, factor, softcap):
    """(shift in base 2, lse, max_logit, entropy) of rows; 0, -inf, -inf, 0 for a row without keys, NaN of NaN."""
    empty = row_sum == 0.0
    total = tl.where(empty, 1.0, row_sum)
    shift = running_max
    if softcap is not None:
        shift = soft_cap(running_max, softcap)
    shift = tl.where(empty, 0.0, shift)
    lse = tl.where(empty, float("-inf"), (shift + tl.log2(total)) * LN_2)
    entropy = tl.where(empty, 0.0, (tl.log2(total) - row_spread / total) * LN_2)
    max_logit = tl.where((factor == TINY) & (row_sum > 0.0), 0.0, running_max * LN_2)  # TINY stands for 0
    max_logit = tl.where(row_sum == row_sum, max_logit, row_sum)  # a GPU's maximum passes over NaN
    return shift, lse, max_logit, tl.where(entropy < 0.0, 0.0, entropy)


@triton.jit
def softmax_total(row_sum, shift, sinks_ptr, head):
    """(weight, total): the output is weight * accumulator / total; a sink joins the total only."""
    if sinks_ptr is None:
        weight = 1.0
        total = row_sum
    else:
        sink = tl.load(sinks_ptr + head) * LOG2_E
        peak = tl.maximum(shift, sink)
        weight = tl.exp2(shift - peak)
        total = tl.fma(row_sum, weight, tl.exp2(sink - peak))
    return weight, tl.where(total == 0.0, 1.0, total)


@triton.jit
def _attend(
    accumulator, running_max, running_sum, running_spread, q, factor, softcap,
    k_ptr, v_ptr, k_descriptor, v_descriptor, key_scale_ptr, seen_ptr, mask_ptr, dropout_ptr, keep_from,
    offs_row, lo, hi, q_len, k_len, touch_lo, touch_hi, full_start, full_end,
    batch, kv_head, batch_head, first_packed_row, first_packed_key,
    k_stride_s, k_stride_d, v_stride_s, v_stride_d, key_scale_stride_s, mask_stride_q, mask_stride_k,
    HEAD_DIM: tl.constexpr, VALUE_DIM: tl.constexpr, BLOCK_N: tl.constexpr, BOUNDED_BELOW: tl.constexpr,
    PRECISION: tl.constexpr, WIDE: tl.constexpr, ENTROPY: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """Online softmax over the blocks of [full_start, full_end), or, where MASKED, over those around it."""
    start, end = full_start, full_end
    if MASKED:
        start, end = touch_lo // BLOCK_N * BLOCK_N, touch_hi - (full_end - full_start)
    k_offsets = tile_offsets(BLOCK_N, q.shape[1], k_stride_s, k_stride_d, WIDE)
    v_offsets = tile_offsets(BLOCK_N, accumulator.shape[1], v_stride_s, v_stride_d, WIDE)
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
            logits *= load_vector(scale_ptrs, keep_key, MASKED)[None, :]
            scale_ptrs += BLOCK_N * key_scale_stride_s
        keep = None
        if MASKED:
            keep = visible_tile(
                offs_row, offs_key, lo, hi, mask_ptr, q_len, k_len, mask_stride_q, mask_stride_k, BOUNDED_BELOW
            )
        probabilities, decay, running_max, running_sum, running_spread = online_softmax(
            logits, keep, factor, softcap, running_max, running_sum, running_spread, MASKED, ENTROPY
        )
        if dropout_ptr is not None:
            kept = dropout_keeps(
                dropout_ptr, keep_from, batch_head, (first_packed_row + offs_row)[:, None],
                (first_packed_key + offs_key)[None, :],
            )  # fmt: skip
            probabilities = tl.where(kept, probabilities, 0.0)
        accumulator = accumulator * decay[:, None]
        accumulator = tl.dot(probabilities.to(v.dtype), v, accumulator, input_precision=PRECISION)
    return accumulator, running_max, running_sum, running_spread


@triton.jit(do_not_specialize=LENGTHS, do_not_specialize_on_alignment=COUNTS)
def attention_forward(
    k_descriptor, v_descriptor, q_ptr, k_ptr, v_ptr, query_scale_ptr, key_scale_ptr, sinks_ptr,
    key_lengths_ptr, key_ranges_ptr, mask_ptr, seen_ptr, q_starts_ptr, k_starts_ptr, dropout_ptr,
    out_ptr, rounding_ptr, lse_ptr, max_logit_ptr, entropy_ptr,
    scale, softcap, keep_from, keep_scale, left, right, q_len, k_len, q_heads, group, first_head, first_member,
    q_stride_b, q_stride_h, q_stride_s, q_stride_d, k_stride_b, k_stride_h, k_stride_s, k_stride_d,
    v_stride_b, v_stride_h, v_stride_s, v_stride_d, query_scale_stride_b, query_scale_stride_h, query_scale_stride_s,
    key_scale_stride_b, key_scale_stride_h, key_scale_stride_s,
    mask_stride_b, mask_stride_h, mask_stride_q, mask_stride_k,
    HEAD_DIM: tl.constexpr, VALUE_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, SUM_COLUMNS: tl.constexpr, PRECISION: tl.constexpr,
    WIDE: tl.constexpr,
):  # fmt: skip
    """Attention output and statistics of the softmax for BLOCK_M query rows of one (batch or sequence, head).

        x[i, j]      = scale * (q[i] . k[j]) * query_scale[i] * key_scale[j]      j visible to i
        z[i, j]      = softcap * tanh(x[i, j] / softcap), or x[i, j] without softcap
        lse[i]       = ln sum_j exp(z[i, j])
        max_logit[i] = max_j x[i, j]
        entropy[i]   = lse[i] - sum_j exp(z[i, j] - lse[i]) * z[i, j]
        out[i]       = sum_j keep[i, j] * keep_scale * exp(z[i, j]) * v[j] / (exp(lse[i]) + exp(sinks[head]))

    Grid: (blocks of the longest Sq, Hq, members); each program writes its rows of the results, all of them, once.

    q, k, v          [B, Hq, Sq, D], [B, Hkv, Sk, D], [B, Hkv, Sk, Dv]  fp16, bf16 or fp32, any strides; group = Hq/Hkv
    *_descriptor     tensor descriptors of k and v with blocks [1, 1, BLOCK_N, BLOCK_D or BLOCK_DV], or None
    query_scale      fp32 [B, Hq, Sq] or None = 1, any sign; key_scale  fp32 [B, Hkv, Sk] or None = 1
    sinks            fp32 [Hq] or None
    key_lengths, key_ranges, left, right: `primitives.row_range`; q_starts, k_starts: `primitives.sequence_bounds`
    mask             uint8, strides of [B, Hq, Sq, Sk] (0 on broadcast axes), or None
    seen             uint8 [B, Hkv, Sk] contiguous or None: keys that some row sees; the rest is never multiplied
    dropout          `primitives.dropout_keeps` or None = no dropout
    out, lse         [B, Hq, Sq, Dv] in q's dtype and fp32 [B, Hq, Sq] in natural log, contiguous; max_logit and
                     entropy likewise or None
    rounding         what out lost when it was rounded to q's dtype, as out, or None
    BLOCK_D, BLOCK_DV  powers of two >= 16 that hold HEAD_DIM and VALUE_DIM

    Products accumulate in fp32; the scales act in fp32 on the accumulated product; the sign of a row's factor is folded
    into its q, which is exact. P is rounded to v's dtype before P @ V. A row without keys gives out 0, lse -inf.
    Online softmax: Milakov & Gimelshein 2018, arXiv:1805.02867; blocking: Dao 2023, arXiv:2307.08691, Algorithm 1.
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

    q_ptr += wide_batch * q_stride_b + wide_head * q_stride_h + memory_row * q_stride_s
    factor = tl.full([BLOCK_M], 1.0, tl.float32) * (scale * LOG2_E)
    if query_scale_ptr is not None:
        query_scale_ptr += wide_batch * query_scale_stride_b + wide_head * query_scale_stride_h
        row_offsets = memory_row + tl.arange(0, BLOCK_M)
        factor *= tl.load(query_scale_ptr + row_offsets * query_scale_stride_s, mask=keep_row, other=0.0)
    q_ptrs = q_ptr + tile_offsets(BLOCK_M, BLOCK_D, q_stride_s, q_stride_d, WIDE)
    row_base = (wide_batch * q_heads + wide_head) * rows + memory_row
    scratch_ptrs = out_ptr + row_base * VALUE_DIM + tile_offsets(BLOCK_M, BLOCK_D, VALUE_DIM, 1, False)
    q = load_signed(q_ptrs, scratch_ptrs, factor, keep_row, HEAD_DIM, VALUE_DIM)
    factor = tl.abs(factor)
    factor = tl.where(factor == 0.0, TINY, factor)

    k_ptr += wide_batch * k_stride_b + kv_head.to(tl.int64) * k_stride_h + memory_key * k_stride_s
    v_ptr += wide_batch * v_stride_b + kv_head.to(tl.int64) * v_stride_h + memory_key * v_stride_s
    if key_scale_ptr is not None:
        key_scale_ptr += wide_batch * key_scale_stride_b + kv_head.to(tl.int64) * key_scale_stride_h
        key_scale_ptr += memory_key * key_scale_stride_s
    if mask_ptr is not None:
        mask_ptr += wide_batch * mask_stride_b + wide_head * mask_stride_h
    if seen_ptr is not None:
        seen_ptr += (wide_batch * (q_heads // group) + kv_head) * k_len

    running_max = tl.full([BLOCK_M], float("-inf"), tl.float32)
    running_sum = tl.zeros([BLOCK_M, SUM_COLUMNS], tl.float32)
    running_spread = tl.zeros([BLOCK_M, SUM_COLUMNS], tl.float32)
    accumulator = tl.zeros([BLOCK_M, BLOCK_DV], tl.float32)
    # Masks hold registers: masked steps take half of a wide block.
    MASKED_STEP: tl.constexpr = BLOCK_N // 2 if BLOCK_N >= 64 else BLOCK_N
    BOUNDED_BELOW: tl.constexpr = left is not None or key_ranges_ptr is not None
    lo, hi = row_range(offs_row, batch, q_len, k_len, left, right, key_lengths_ptr, key_ranges_ptr)
    touch_lo, touch_hi, full_start, full_end = key_blocks_of_rows(
        lo, hi, first_row, last_row, batch, q_len, k_len, left, right, key_lengths_ptr, key_ranges_ptr, mask_ptr,
        BLOCK_N,
    )  # fmt: skip
    for walk in tl.static_range(2):  # the blocks that need a mask, then the others
        if walk == 0 or mask_ptr is None:
            accumulator, running_max, running_sum, running_spread = _attend(
                accumulator, running_max, running_sum, running_spread, q, factor, softcap,
                k_ptr, v_ptr, k_descriptor, v_descriptor, key_scale_ptr, seen_ptr, mask_ptr, dropout_ptr, keep_from,
                offs_row, lo, hi, q_len, k_len, touch_lo, touch_hi, full_start, full_end,
                batch, kv_head, batch * q_heads + head, first_packed_row, first_packed_key,
                k_stride_s, k_stride_d, v_stride_s, v_stride_d, key_scale_stride_s, mask_stride_q, mask_stride_k,
                HEAD_DIM, VALUE_DIM, MASKED_STEP if walk == 0 else BLOCK_N, BOUNDED_BELOW, PRECISION, WIDE,
                entropy_ptr is not None, walk == 0,
            )  # fmt: skip

    row_sum = tl.sum(running_sum, 1)
    shift, lse, max_logit, entropy = softmax_results(running_max, row_sum, tl.sum(running_spread, 1), factor, softcap)
    weight, total = softmax_total(row_sum, shift, sinks_ptr, head)
    out = accumulator / total[:, None]
    if sinks_ptr is not None:
        out *= weight[:, None]
    if dropout_ptr is not None:
        out *= keep_scale
    # Offsets of 32 bits: those of 64, wanted twice, would hold registers all through the loops.
    out_offsets = tile_offsets(BLOCK_M, BLOCK_DV, VALUE_DIM, 1, False)
    store_tile(out_ptr + row_base * VALUE_DIM + out_offsets, out, keep_row, VALUE_DIM)
    if rounding_ptr is not None:
        rounded = out.to(out_ptr.dtype.element_ty).to(tl.float32)
        store_tile(rounding_ptr + row_base * VALUE_DIM + out_offsets, out - rounded, keep_row, VALUE_DIM)
    row_offsets = row_base + tl.arange(0, BLOCK_M)
    tl.store(lse_ptr + row_offsets, lse, mask=keep_row)
    if max_logit_ptr is not None:
        tl.store(max_logit_ptr + row_offsets, max_logit, mask=keep_row)
    if entropy_ptr is not None:
        tl.store(entropy_ptr + row_offsets, entropy, mask=keep_row)
