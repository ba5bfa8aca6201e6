"""The gradient of a tangent, the pass over rows: towards q and query_scale, and towards their tangents."""

from __future__ import annotations

import triton
import triton.language as tl

from .block import (
    LENGTHS,
    from_row,
    load_tile,
    program_in_section,
    sequence_bounds,
    tile_offsets,
    vector_from,
)
from .pairs import UNMASKED, dropout_keeps, key_bounds, key_range, pair_terms, pass_bounds, visible
from .records import View
from .softmax import LN_2, LOG2_E, exponents, gradients_of_tangent, partial_sums


@triton.jit(do_not_specialize=[*LENGTHS, "group"])
def attention_grad_query_second(
    q,
    k,
    v,
    d_out,
    tangents,
    terms,
    extent,
    relative_right,
    key_size,
    row_terms,
    masks,
    gradients,
    t_gradients,
    scale,
    softcap,
    keep_from,
    dropout_ptr,
    keep_scale,
    left,
    right,
    q_len,
    k_len,
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
    WIDE: tl.constexpr,
    ALIGNED: tl.constexpr,
    NUM_XCDS: tl.constexpr,
):
    """Gradients of `attention_tangent` for BLOCK_M rows of one (batch or sequence, head); names as there.

        dp[i, j]   = keep[i, j] * keep_scale * (d_out[i] . v[j]),  t_dp likewise of t_v
        d_x, d_t_x   of `gradients_of_tangent`, from P = exp(z) / total, dp, t_dp and t_x
        c[i, j]    = d_x * query_scale[i] * key_scale[j]
                     + d_t_x * (t_query_scale[i] * key_scale[j] + query_scale[i] * t_key_scale[j])
        e[i, j]    = d_t_x * query_scale[i] * key_scale[j]
        d_q[i]     = scale * sum_j c[i, j] * k[j] + e[i, j] * t_k[j]
        d_t_q[i]   = scale * sum_j e[i, j] * k[j]
        d_query_scale[i]   = scale * sum_j d_x * s * key_scale[j] + d_t_x * (t_s * key_scale[j] + s * t_key_scale[j])
        d_t_query_scale[i] = scale * sum_j d_t_x * s * key_scale[j]

    7 products a tile, 8 with d_t_q; a tangent that is None costs none, nor does a gradient.

    d_out        `Strided` [B, Hq, Sq, Dv], the gradient of out's tangent
    key_size     fp32 [B, Hkv] or None: the largest |key_scale| and |t_key_scale|, as in `attention_grad_query`
    row_terms    `SecondTerms`
    gradients, t_gradients   `TensorGradients` towards tensors and towards their tangents: q [B, Hq, Sq, D],
                 query_scale fp32 [B, Hq, Sq], contiguous or None; every row is written once
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

    exponent_term = tl.load(row_terms.exponent + row_offsets, mask=keep_row, other=float("-inf"))  # [BLOCK_M]
    live = exponent_term != float("-inf")
    mean = tl.load(row_terms.mean + row_offsets, mask=live, other=0.0)  # [BLOCK_M]
    delta = tl.load(row_terms.delta + row_offsets, mask=live, other=0.0)  # [BLOCK_M]
    eta = tl.load(row_terms.eta + row_offsets, mask=live, other=0.0)  # [BLOCK_M]
    factor = tl.full([BLOCK_M], 1.0, tl.float32)  # [BLOCK_M]
    if terms.query_scale is not None:
        scale_ptrs = vector_from(terms.query_scale, batch, head, 0, memory_row + block_rows)
        factor = tl.load(scale_ptrs, mask=live, other=0.0)
    row_size = factor
    if tangents.query_scale is not None:
        scale_ptrs = vector_from(tangents.query_scale, batch, head, 0, memory_row + block_rows)
        t_factor = tl.load(scale_ptrs, mask=live, other=0.0)  # [BLOCK_M]
        row_size = tl.maximum(tl.abs(factor), tl.abs(t_factor))  # what is rounded to 16 bits does not depend on it
        row_size = tl.where(row_size == 0.0, 1.0, row_size)
        of_row, t_of_row = factor / row_size, t_factor / row_size  # [BLOCK_M]
    q = from_row(q, batch, head, memory_row, ALIGNED)
    q_tile = load_tile(q.ptr + tile_offsets(block_rows, BLOCK_D, q.s, q.d, WIDE), live, HEAD_DIM)  # [BLOCK_M, BLOCK_D]
    if tangents.q is not None:
        t_q = from_row(tangents.q, batch, head, memory_row, ALIGNED)
        t_q_ptrs = t_q.ptr + tile_offsets(block_rows, BLOCK_D, t_q.s, t_q.d, WIDE)
        t_q_tile = load_tile(t_q_ptrs, live, HEAD_DIM)  # [BLOCK_M, BLOCK_D]
    d_out = from_row(d_out, batch, head, memory_row, ALIGNED)
    do_ptrs = d_out.ptr + tile_offsets(block_rows, BLOCK_DV, d_out.s, d_out.d, WIDE)
    do = load_tile(do_ptrs, live, VALUE_DIM)  # [BLOCK_M, BLOCK_DV]

    k, v = from_row(k, batch, kv_head, first_key, ALIGNED), from_row(v, batch, kv_head, first_key, ALIGNED)
    if tangents.k is not None:
        t_k = from_row(tangents.k, batch, kv_head, first_key, ALIGNED)
    if tangents.v is not None:
        t_v = from_row(tangents.v, batch, kv_head, first_key, ALIGNED)
    if masks.seen is not None:
        seen_ptr = masks.seen + (batch.to(tl.int64) * (q_heads // group) + kv_head) * k_len
    if key_size is not None:
        key_size = tl.load(key_size + batch * (q_heads // group) + kv_head)
    kv_start, kv_end, full_start, full_end = key_bounds(
        start_m, tl.minimum(start_m + BLOCK_M, q_len) - 1, lo, hi, batch, view, BLOCK_N, masks.mask is not None
    )

    OF_PAIRS: tl.constexpr = tangents.bias is not None or tangents.relative_bias is not None
    OF_BIASES: tl.constexpr = OF_PAIRS or tangents.key_bias is not None
    AFTER: tl.constexpr = terms.bias_after_softcap is not None
    HAS_PAIRS: tl.constexpr = terms.bias is not None or terms.relative_bias is not None
    shift = k_len - q_len + first_key - first_row  # of `pair_terms`
    if terms.relative_bias is not None:
        shift += relative_right
    rows = (first_row + offs_m)[:, None]  # [BLOCK_M, 1], in the packed axis
    dq = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)  # [BLOCK_M, BLOCK_D]
    d_t_q = dq  # [BLOCK_M, BLOCK_D]
    d_factor = tl.zeros([BLOCK_M, SUM_COLUMNS], tl.float32)  # [BLOCK_M, SUM_COLUMNS]
    d_t_factor = d_factor
    MASKED_N: tl.constexpr = BLOCK_N // 2 if BLOCK_N >= 64 else BLOCK_N  # see `attention_forward`
    for PASS in tl.static_range(0, 2):
        if PASS != UNMASKED or masks.mask is None:
            step = tl.arange(0, BLOCK_N if PASS == UNMASKED else MASKED_N)  # [N]
            n_lo, n_hi, loop_start, loop_end, gap_start, gap = pass_bounds(
                kv_start, kv_end, full_start, full_end, step.shape[0], PASS, False
            )
            for position in tl.range(loop_start, loop_end, step.shape[0]):
                start_n = position
                if PASS != UNMASKED:
                    start_n = tl.where(position >= gap_start, position + gap, position)
                start_n = tl.multiple_of(start_n, step.shape[0])
                offs_n = start_n + step  # [N]
                first_n = start_n.to(tl.int64)
                keys = (first_key + offs_n)[None, :]  # [1, N], in the packed axis
                load_key = tl.full(step.shape, 1, tl.int1)  # [N]
                is_read = load_key[None, :]  # [1, N]
                if PASS != UNMASKED:
                    load_key = (offs_n >= n_lo) & (offs_n < n_hi)
                    if masks.seen is not None:
                        load_key = load_key & (tl.load(seen_ptr + offs_n, mask=load_key, other=0) != 0)
                    is_read = visible(offs_m, offs_n, lo, hi, batch, head, view, masks.mask)  # [BLOCK_M, N]
                if HAS_PAIRS:  # see `attention_forward`
                    biases = pair_terms(terms, extent, batch, head, rows, keys, shift, is_read)[0]  # [BLOCK_M, N]
                if OF_PAIRS:
                    t_biases = pair_terms(tangents, extent, batch, head, rows, keys, shift, is_read)[0] * LN_2
                k_ptrs = k.ptr + first_n * k.s + tile_offsets(step, BLOCK_D, k.s, k.d, WIDE)
                k_tile = load_tile(k_ptrs, load_key, HEAD_DIM)  # [N, BLOCK_D]
                s = tl.dot(q_tile, k_tile.T, input_precision="ieee")  # [BLOCK_M, N]
                t_s = tl.zeros_like(s)
                if tangents.q is not None:
                    t_s = tl.dot(t_q_tile, k_tile.T, t_s, input_precision="ieee")  # [BLOCK_M, N]
                if tangents.k is not None:
                    t_k_ptrs = t_k.ptr + first_n * t_k.s + tile_offsets(step, BLOCK_D, t_k.s, t_k.d, WIDE)
                    t_k_tile = load_tile(t_k_ptrs, load_key, HEAD_DIM)  # [N, BLOCK_D]
                    t_s = tl.dot(q_tile, t_k_tile.T, t_s, input_precision="ieee")  # [BLOCK_M, N]
                if terms.key_scale is not None:
                    key_scale_ptrs = vector_from(terms.key_scale, batch, kv_head, 0, first_key + offs_n)
                    key_scales = tl.load(key_scale_ptrs, mask=load_key, other=0.0)[None, :]  # [1, N]
                    t_s *= key_scales
                    if tangents.key_scale is not None:
                        key_scale_ptrs = vector_from(tangents.key_scale, batch, kv_head, 0, first_key + offs_n)
                        t_key_scales = tl.load(key_scale_ptrs, mask=load_key, other=0.0)[None, :]  # [1, N]
                        t_s = tl.fma(s, t_key_scales, t_s)
                    s *= key_scales
                if terms.key_bias is not None:
                    bias_ptrs = vector_from(terms.key_bias, batch, kv_head, head % group, first_key + offs_n)
                    of_keys = (tl.load(bias_ptrs, mask=load_key, other=0.0) * LOG2_E)[None, :]  # [1, N]
                    biases = biases + of_keys if HAS_PAIRS else of_keys
                if tangents.key_bias is not None:
                    bias_ptrs = vector_from(tangents.key_bias, batch, kv_head, head % group, first_key + offs_n)
                    of_keys = tl.load(bias_ptrs, mask=load_key, other=0.0)[None, :]  # [1, N]
                    t_biases = t_biases + of_keys if OF_PAIRS else of_keys
                factors = (factor * (scale * LOG2_E))[:, None]  # [BLOCK_M, 1]
                exponent, capped = exponents(s, factors, biases if HAS_BIAS else None, exponent_term, softcap, terms, 1)
                p = tl.exp2(exponent)  # [BLOCK_M, N]
                t_x = t_s * (factor * scale)[:, None]  # [BLOCK_M, N]
                if tangents.query_scale is not None:
                    t_x = tl.fma(s, (t_factor * scale)[:, None], t_x)
                if OF_BIASES and not AFTER:
                    t_x += t_biases
                if PASS != UNMASKED:
                    p, t_x = tl.where(is_read, p, 0.0), tl.where(is_read, t_x, 0.0)
                v_ptrs = v.ptr + first_n * v.s + tile_offsets(step, BLOCK_DV, v.s, v.d, WIDE)
                v_tile = load_tile(v_ptrs, load_key, VALUE_DIM)  # [N, BLOCK_DV]
                dp = tl.dot(do, v_tile.T, input_precision="ieee")  # [BLOCK_M, N]
                if tangents.v is not None:
                    t_v_ptrs = t_v.ptr + first_n * t_v.s + tile_offsets(step, BLOCK_DV, t_v.s, t_v.d, WIDE)
                    t_v_tile = load_tile(t_v_ptrs, load_key, VALUE_DIM)  # [N, BLOCK_DV]
                    t_dp = tl.dot(do, t_v_tile.T, input_precision="ieee")  # [BLOCK_M, N]
                if dropout_ptr is not None:
                    batch_head, first = batch * q_heads + head, first_key + start_n
                    kept = dropout_keeps(dropout_ptr, keep_from, batch_head, rows, first, step.shape[0])
                    dp = tl.where(kept, dp * keep_scale, 0.0)
                    if tangents.v is not None:
                        t_dp = tl.where(kept, t_dp * keep_scale, 0.0)
                _, _, _, d_x, d_t_x = gradients_of_tangent(
                    p,
                    dp,
                    t_dp if tangents.v is not None else None,
                    t_x,
                    t_biases if OF_BIASES and AFTER else None,
                    capped,
                    mean[:, None],
                    delta[:, None],
                    eta[:, None],
                    softcap,
                )
                if gradients.query_scale is not None:
                    d_factor += partial_sums(tl.fma(d_x, s, d_t_x * t_s), SUM_COLUMNS)
                if t_gradients.query_scale is not None:
                    d_t_factor += partial_sums(d_t_x * s, SUM_COLUMNS)
                if tangents.query_scale is not None:
                    d_x = tl.fma(d_x, of_row[:, None], d_t_x * t_of_row[:, None])
                    d_t_x *= of_row[:, None]
                if terms.key_scale is not None:
                    if key_size is not None:
                        key_scales *= 1.0 / key_size
                    d_x *= key_scales
                    if tangents.key_scale is not None:
                        if key_size is not None:
                            t_key_scales *= 1.0 / key_size
                        d_x = tl.fma(d_t_x, t_key_scales, d_x)
                    d_t_x *= key_scales
                if gradients.q is not None:
                    dq = tl.dot(d_x.to(k_tile.dtype), k_tile, dq, input_precision="ieee")  # [BLOCK_M, BLOCK_D]
                    if tangents.k is not None:
                        dq = tl.dot(d_t_x.to(k_tile.dtype), t_k_tile, dq, input_precision="ieee")
                if t_gradients.q is not None:
                    d_t_q = tl.dot(d_t_x.to(k_tile.dtype), k_tile, d_t_q, input_precision="ieee")

    of_rows = row_size * scale  # [BLOCK_M]
    if key_size is not None:
        of_rows *= key_size
    offsets = row_base * HEAD_DIM + tile_offsets(block_rows, BLOCK_D, HEAD_DIM, 1, False)  # [BLOCK_M, BLOCK_D]
    keep_q = keep_row[:, None] & (tl.arange(0, BLOCK_D)[None, :] < HEAD_DIM)
    if gradients.q is not None:
        dq *= of_rows[:, None]
        tl.store(gradients.q + offsets, dq.to(gradients.q.dtype.element_ty), mask=keep_q)
    if t_gradients.q is not None:
        d_t_q *= of_rows[:, None]
        tl.store(t_gradients.q + offsets, d_t_q.to(t_gradients.q.dtype.element_ty), mask=keep_q)
    if gradients.query_scale is not None:
        tl.store(gradients.query_scale + row_offsets, tl.sum(d_factor, 1) * scale, mask=keep_row)
    if t_gradients.query_scale is not None:
        tl.store(t_gradients.query_scale + row_offsets, tl.sum(d_t_factor, 1) * scale, mask=keep_row)
