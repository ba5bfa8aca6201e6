"""Backward, the pass over rows: gradients of q and query_scale."""

from __future__ import annotations

import triton
import triton.language as tl

from .block import (
    LENGTHS,
    ROW_TERMS_ALIGNMENT,
    from_row,
    load_term,
    load_tile,
    program_in_section,
    sequence_bounds,
    store_term,
    terms_offset,
    tile_offsets,
    vector_from,
)
from .pairs import UNMASKED, dropout_keeps, key_bounds, key_range, pair_terms, pass_bounds, visible
from .records import View
from .softmax import LOG2_E, exponents, partial_sums, soft_cap_slope, softcap_of_rows

# A block of rows loops over so few keys twice. Among more, some row's exact gradient is far larger than an error.
FEW_KEYS = tl.constexpr(64)
AGAIN = tl.constexpr(3)  # the pass behind those of `pass_bounds`, which repeats few keys


@triton.jit(do_not_specialize=[*LENGTHS, "group"])
def attention_grad_query(
    k_descriptor,  # first: see `attention_forward`
    v_descriptor,
    q,
    k,
    v,
    d_out,
    terms,
    extent,
    relative_right,
    key_size,
    row_terms,
    masks,
    gradients,
    scale,
    softcap,
    keep_from,
    dropout_ptr,
    keep_scale,
    left,
    right,
    q_len,
    k_len,
    terms_len,
    q_heads,
    group,
    first_head,
    first_y,
    first_z,
    HEAD_DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    SUM_COLUMNS: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    CORRECT_DELTA: tl.constexpr,
    IS_PART: tl.constexpr,
    WIDE: tl.constexpr,
    ALIGNED: tl.constexpr,
    INVARIANT: tl.constexpr,
    NUM_XCDS: tl.constexpr,
    WARP_SPECIALIZE: tl.constexpr,
):
    """Gradients of q and query_scale for BLOCK_M rows of one (batch or sequence, head), as `attention_forward`.

        P[i, j]          = exp(z[i, j]) / total[i]
        dS[i, j]         = P[i, j] * (keep[i, j] * keep_scale * (d_out[i] . v[j]) - delta[i])
        dX[i, j]         = dS[i, j] * dz/dx,  dz/dx = 1 - (tanh(x[i, j] / softcap))^2
        raw[i]           = sum_j dX[i, j] * key_scale[j] * r[i, j] * k[j]
        d_q[i]           = scale * query_scale[i] * raw[i]
        d_query_scale[i] = scale * sum_j dX[i, j] * (q[i] . k[j]) * key_scale[j] * r[i, j]

    row_terms: `RowTerms`, see `attention_row_terms`. corrected is None, or like terms: receives them with the corrected
    delta. `TensorGradients`: q [B, Hq, Sq, D] in q's dtype and query_scale fp32 [B, Hq, Sq] or None, contiguous, every
    row written once.

    key_size     fp32 [B, Hkv] or None: the largest |key_scale|, never 0. dX * key_scale / key_size is rounded to 16
                 bits, so that no size of the key scales pushes it out of fp16's range

    d_query_scale equals scale * (q[i] . raw[i]). That form would sum dX after rounding to 16 bits, and with it delta's
    error times the mean logit, which exceeds the result for sharp softmaxes; so dX stays in fp32. Over a row, dS must
    sum to d_lse - d_sinks: the excess of its sum is delta's error. The kernel takes that error's share out of the
    gradient, and corrects delta for the pass over the keys. With a bias or a relative scale, whose gradients cancel
    likewise when they are summed, it does so without d_query_scale too. So does CORRECT_DELTA, which also computes d_q
    of few keys with the corrected delta: for a single key, dP - delta is nothing but their errors.
    IS_PART: rows attend to other keys too, so that nothing is known about these sums, and delta stays as it is.
    """
    block, head, sequence = program_in_section(q_heads, first_head, first_y, first_z, right is not None, NUM_XCDS)
    if sequence < 0:
        return
    packed_len, kv_head = q_len, head // group
    batch, first_row, first_key, q_len, k_len = sequence_bounds(sequence, q_len, k_len, masks.q_starts, masks.k_starts)
    start_m = block * BLOCK_M
    if masks.q_starts is not None:
        if start_m >= q_len:
            return
    view = View(q_len, k_len, left, right, masks.key_lengths, masks.key_ranges)
    block_rows = tl.arange(0, BLOCK_M)
    keep_row = start_m + block_rows < q_len  # [BLOCK_M]
    offs_m = tl.minimum(start_m + block_rows, q_len - 1)  # [BLOCK_M]
    lo, hi = key_range(offs_m, batch, view)  # [BLOCK_M]
    memory_row = (first_row + start_m).to(tl.int64)
    row_base = (batch.to(tl.int64) * q_heads + head.to(tl.int64)) * packed_len + memory_row
    row_offsets = row_base + block_rows

    first_term = terms_offset(batch, head, sequence, first_row, q_heads, terms_len, masks.q_starts)
    term_offsets = first_term + start_m + block_rows  # [BLOCK_M]
    factor = tl.full([BLOCK_M], 1.0, tl.float32) * (scale * LOG2_E)  # [BLOCK_M]
    exponent_term, factor = load_term(row_terms.terms + 2 * term_offsets, factor, False)  # [BLOCK_M]
    delta = tl.load(row_terms.delta + term_offsets)  # [BLOCK_M]
    if row_terms.of_exponents is not None:
        of_exponents = tl.load(row_terms.of_exponents + term_offsets)  # [BLOCK_M]
    if terms.query_scale_after_softcap is not None:
        softcap = softcap_of_rows(softcap, factor, scale)  # [BLOCK_M]
    live = exponent_term != float("-inf")
    q = from_row(q, batch, head, memory_row, ALIGNED)
    q_tile = load_tile(q.ptr + tile_offsets(block_rows, BLOCK_D, q.s, q.d, WIDE), live, HEAD_DIM)  # [BLOCK_M, BLOCK_D]
    d_out = from_row(d_out, batch, head, memory_row, ALIGNED)
    do_ptrs = d_out.ptr + tile_offsets(block_rows, BLOCK_DV, d_out.s, d_out.d, WIDE)  # [BLOCK_M, BLOCK_DV]
    do = load_tile(do_ptrs, live, VALUE_DIM)  # [BLOCK_M, BLOCK_DV]

    k, v = from_row(k, batch, kv_head, first_key, ALIGNED), from_row(v, batch, kv_head, first_key, ALIGNED)
    if masks.seen is not None:
        seen_ptr = masks.seen + (batch.to(tl.int64) * (q_heads // group) + kv_head) * k_len
    if key_size is not None:
        key_size = tl.load(key_size + batch * (q_heads // group) + kv_head)
    if terms.key_scale is not None:
        key_scale_ptr = vector_from(terms.key_scale, batch, kv_head, 0, first_key)
    if terms.key_bias is not None:
        key_bias_ptr = vector_from(terms.key_bias, batch, kv_head, head % group, first_key)
    kv_start, kv_end, full_start, full_end = key_bounds(
        start_m, tl.minimum(start_m + BLOCK_M, q_len) - 1, lo, hi, batch, view, BLOCK_N, masks.mask is not None
    )

    # SUMS 1: of dS. 2: also of dX * x and P * dz/dx * x, x without the row's factor and without bias. All in fp32; the
    # products are fma's with 0, which nothing fuses further.
    OF_TERMS: tl.constexpr = HAS_BIAS or terms.relative_scale is not None
    SUMS: tl.constexpr = 2 if gradients.query_scale is not None else 1 if CORRECT_DELTA or OF_TERMS else 0
    HAS_PAIRS: tl.constexpr = terms.bias is not None or terms.relative_bias is not None
    READS_PAIRS: tl.constexpr = HAS_PAIRS or terms.relative_scale is not None
    shift = k_len - q_len + first_key - first_row  # of `pair_terms`
    if relative_right is not None:
        shift += relative_right
    rows = (first_row + offs_m)[:, None]  # [BLOCK_M, 1], in the packed axis
    dq = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)  # [BLOCK_M, BLOCK_D]
    ds_sum = tl.zeros([BLOCK_M, SUM_COLUMNS], tl.float32)  # [BLOCK_M, SUM_COLUMNS]
    d_factor, mean_logit = ds_sum, ds_sum
    FIRST: tl.constexpr = 1 if INVARIANT and left is None and masks.key_ranges is None else 0
    MASKED_N: tl.constexpr = BLOCK_N // 2 if BLOCK_N >= 64 and not INVARIANT else BLOCK_N  # see `attention_forward`
    for PASS in tl.static_range(FIRST, 4):
        if PASS == AGAIN and SUMS and not IS_PART:
            excess = tl.sum(ds_sum, 1)  # sum_j dS[i, j] - (d_lse[i] - d_sinks[i]): minus the error of delta[i]
            if row_terms.d_lse is not None:
                excess -= tl.load(row_terms.d_lse + row_offsets, mask=live, other=0.0)
            if row_terms.d_sinks is not None:
                excess += tl.load(row_terms.d_sinks + row_offsets, mask=live, other=0.0)
            delta += excess
        if PASS == AGAIN and CORRECT_DELTA:
            if INVARIANT:  # row by row: those of more keys keep their sum, with probabilities of 0
                are_few = hi - lo <= FEW_KEYS
                dq = tl.where(are_few[:, None], 0.0, dq)
                exponent_term = tl.where(are_few, exponent_term, float("-inf"))
                repeats = are_few & (lo < hi)
                kv_start, kv_end = tl.min(tl.where(repeats, lo, k_len), 0), tl.max(tl.where(repeats, hi, 0), 0)
            else:
                are_few = kv_end - kv_start <= FEW_KEYS
                dq = tl.where(are_few, 0.0, dq)
                kv_end = tl.where(are_few, kv_end, 0)
            full_end = full_start
        if (PASS != UNMASKED or masks.mask is None) and (PASS != 2 or INVARIANT) and (PASS != AGAIN or CORRECT_DELTA):
            step = tl.arange(0, BLOCK_N if PASS == UNMASKED else MASKED_N)  # [N]
            n_lo, n_hi, loop_start, loop_end, gap_start, gap = pass_bounds(
                kv_start, kv_end, full_start, full_end, step.shape[0], PASS, INVARIANT
            )
            k_offsets = tile_offsets(step, BLOCK_D, k.s, k.d, WIDE)  # [N, BLOCK_D]
            v_offsets = tile_offsets(step, BLOCK_DV, v.s, v.d, WIDE)  # [N, BLOCK_DV]
            for position in tl.range(
                loop_start, loop_end, step.shape[0], warp_specialize=WARP_SPECIALIZE and PASS == UNMASKED
            ):
                start_n = position
                if PASS != UNMASKED:
                    start_n = tl.where(position >= gap_start, position + gap, position)
                start_n = tl.multiple_of(start_n, step.shape[0])
                offs_n = start_n + step  # [N]
                keys = (first_key + offs_n)[None, :]  # [1, N], in the packed axis
                load_key = tl.full(step.shape, 1, tl.int1)  # [N]
                if PASS != UNMASKED:
                    load_key = (offs_n >= n_lo) & (offs_n < n_hi)
                    if masks.seen is not None:
                        load_key = load_key & (tl.load(seen_ptr + offs_n, mask=load_key, other=0) != 0)
                if READS_PAIRS:  # loaded before the product, lest the softmax take the layout of the loads
                    is_read = load_key[None, :]  # [1, N]
                    if PASS != UNMASKED:
                        is_read = visible(offs_m, offs_n, lo, hi, batch, head, view, masks.mask)  # [BLOCK_M, N]
                    of_pairs, of_distance = pair_terms(terms, extent, batch, head, rows, keys, shift, is_read)
                if PASS != UNMASKED or k_descriptor is None:
                    k_tile = load_tile(k.ptr + start_n.to(tl.int64) * k.s + k_offsets, load_key, HEAD_DIM)
                    v_tile = load_tile(v.ptr + start_n.to(tl.int64) * v.s + v_offsets, load_key, VALUE_DIM)
                else:
                    k_tile = k_descriptor.load([batch, kv_head, first_key + start_n, 0]).reshape(k_offsets.shape)
                    v_tile = v_descriptor.load([batch, kv_head, first_key + start_n, 0]).reshape(v_offsets.shape)
                s = tl.dot(q_tile, k_tile.T, input_precision="ieee")  # [BLOCK_M, N]
                if terms.key_scale is not None:
                    key_scales = tl.load(
                        key_scale_ptr + offs_n.to(tl.int64) * terms.key_scale.s, mask=load_key, other=0.0
                    )
                    s *= key_scales[None, :]
                if terms.relative_scale is not None:
                    s *= of_distance
                biases = None
                if terms.key_bias is not None:
                    bias_ptrs = key_bias_ptr + offs_n.to(tl.int64) * terms.key_bias.s
                    biases = (tl.load(bias_ptrs, mask=load_key, other=0.0) * LOG2_E)[None, :]  # [1, N]
                if HAS_PAIRS:
                    biases = of_pairs if terms.key_bias is None else biases + of_pairs  # [BLOCK_M, N]
                exponent, capped = exponents(s, factor[:, None], biases, exponent_term, softcap, terms, 1)
                p = tl.exp2(exponent)  # [BLOCK_M, N]
                dp = tl.dot(do, v_tile.T, input_precision="ieee")  # [BLOCK_M, N]
                if PASS != UNMASKED:
                    p = tl.where(visible(offs_m, offs_n, lo, hi, batch, head, view, masks.mask), p, 0.0)
                if dropout_ptr is not None:
                    batch_head, first = batch * q_heads + head, first_key + start_n
                    kept = dropout_keeps(dropout_ptr, keep_from, batch_head, rows, first, step.shape[0])
                    dp = tl.where(kept, dp * keep_scale, 0.0)
                if row_terms.of_exponents is not None:
                    # Hidden pairs may have any exponent, and P of 0 has -inf: their product is NaN.
                    log_p = tl.minimum(tl.maximum(exponent, -256.0), 1.0)  # [BLOCK_M, N]
                    dp = tl.fma(log_p, of_exponents[:, None], dp)
                zero = tl.zeros_like(s)
                ds = tl.fma(p, dp - delta[:, None], zero)  # [BLOCK_M, N]
                if SUMS >= 1 and PASS != AGAIN:
                    ds_sum += partial_sums(ds, SUM_COLUMNS)
                if softcap is not None:
                    cap = softcap if terms.query_scale_after_softcap is None else softcap[:, None]
                    slope = soft_cap_slope(capped, cap)
                    ds *= slope
                    p *= slope
                if SUMS == 2 and PASS != AGAIN:
                    d_factor += partial_sums(tl.fma(ds, s, zero), SUM_COLUMNS)
                    mean_logit += partial_sums(tl.fma(p, s, zero), SUM_COLUMNS)
                if terms.relative_scale is not None:
                    ds *= of_distance
                if terms.key_scale is not None:
                    if key_size is not None:
                        key_scales *= 1.0 / key_size
                    ds *= key_scales[None, :]
                dq = tl.dot(ds.to(k_tile.dtype), k_tile, dq, input_precision="ieee")  # [BLOCK_M, BLOCK_D]

    dq *= scale
    if key_size is not None:
        dq *= key_size
    if terms.query_scale is not None:
        scale_ptrs = vector_from(terms.query_scale, batch, head, 0, memory_row + block_rows)
        dq *= tl.load(scale_ptrs, mask=live, other=0.0)[:, None]
    if SUMS == 2:
        d_query_scale = tl.sum(d_factor, 1)
        if not IS_PART:
            d_query_scale = tl.fma(-excess, tl.sum(mean_logit, 1), d_query_scale)
        tl.store(gradients.query_scale + row_offsets, d_query_scale * scale, mask=keep_row)
    if row_terms.corrected is not None:
        gradient_term = -delta
        if terms.query_scale is not None and not HAS_BIAS:
            gradient_term *= factor
        at = 2 * (first_term + start_m + block_rows)
        tl.store(row_terms.corrected + at, tl.load(row_terms.terms + at))
        store_term(row_terms.corrected + at + 1, gradient_term, factor, None)
        if BLOCK_M < ROW_TERMS_ALIGNMENT:
            if start_m + BLOCK_M >= q_len:  # the last block writes those behind it too
                terms_end = tl.cdiv(q_len, ROW_TERMS_ALIGNMENT) * ROW_TERMS_ALIGNMENT
                for start in range(start_m + BLOCK_M, terms_end, BLOCK_M):
                    at = 2 * (first_term + start + block_rows)
                    tl.store(row_terms.corrected + at, tl.load(row_terms.terms + at))
                    tl.store(row_terms.corrected + at + 1, tl.load(row_terms.terms + at + 1))
    d_q_ptrs = gradients.q + row_base * HEAD_DIM + tile_offsets(block_rows, BLOCK_D, HEAD_DIM, 1, False)
    keep_q = keep_row[:, None] & (tl.arange(0, BLOCK_D)[None, :] < HEAD_DIM)
    tl.store(d_q_ptrs, dq.to(gradients.q.dtype.element_ty), mask=keep_q)
