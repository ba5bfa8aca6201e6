"""The gradient of a tangent, the pass over keys: towards k, v, vectors of keys, biases of pairs, and their tangents."""

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
from .pairs import (
    UNMASKED,
    dropout_keeps,
    pair_terms,
    pass_bounds,
    query_bounds,
    rows_of_keys,
    store_pair_gradients,
    visible_rows,
)
from .records import View
from .softmax import LN_2, LOG2_E, exponents, gradients_of_tangent, partial_sums


@triton.jit(do_not_specialize=LENGTHS, do_not_specialize_on_alignment=["group"])
def attention_grad_key_value_second(
    q,
    k,
    v,
    d_out,
    tangents,
    terms,
    extent,
    relative_right,
    factor_size,
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
    KEY_SUM_COLUMNS: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    WIDE: tl.constexpr,
    ALIGNED: tl.constexpr,
    NUM_XCDS: tl.constexpr,
):
    """Gradients of `attention_tangent` for BLOCK_N keys of one (batch or sequence, kv head); names as in
    `attention_grad_query_second`. A sum over i is one over the rows of all heads of a group.

        c[i, j]  = d_x * query_scale[i] + d_t_x * t_query_scale[i],  e[i, j] = d_t_x * query_scale[i]
        d_k[j]   = scale * sum_i (key_scale[j] * c + t_key_scale[j] * e) * q[i] + key_scale[j] * e * t_q[i]
        d_t_k[j] = scale * key_scale[j] * sum_i e * q[i]
        d_v[j]   = sum_i keep[i, j] * keep_scale * P[i, j] * (t_z[i, j] - mean[i]) * d_out[i]
        d_t_v[j] = sum_i keep[i, j] * keep_scale * P[i, j] * d_out[i]
        d_key_scale[j]   = scale * sum_i c * s + e * t_s
        d_t_key_scale[j] = scale * sum_i e * s
        d_b[i, j] = d_x, d_t_b[i, j] = d_t_x, or behind a softcap d_z and d_t_z; b: see `attention_grad_key_value`

    8 products a tile, 10 with d_t_k and d_t_v. Sums run in one fixed order inside a program: bitwise repeatable.

    factor_size  fp32 [B, Hkv] or None: the largest |query_scale| and |t_query_scale| of the group
    gradients, t_gradients   `TensorGradients` as of `attention_grad_key_value`; all may be None
    """
    kv_heads = q_heads // group
    block, kv_head, sequence = program_in_section(kv_heads, first_head, first_y, first_z, False, NUM_XCDS)
    if sequence < 0:
        return
    packed_len, packed_rows = k_len, q_len
    batch, first_row, first_key, q_len, k_len = sequence_bounds(sequence, q_len, k_len, masks.q_starts, masks.k_starts)
    start_n = block * BLOCK_N
    if masks.q_starts is not None:
        if start_n >= k_len:
            return
    view = View(q_len, k_len, left, right, masks.key_lengths, masks.key_ranges)
    block_keys = tl.arange(0, BLOCK_N)
    offs_n = start_n + block_keys  # [BLOCK_N]
    keep_key = offs_n < k_len  # [BLOCK_N]
    row_lo, row_hi, load_key = rows_of_keys(offs_n, keep_key, batch, view)  # [BLOCK_N]
    if masks.seen is not None:
        seen_ptr = masks.seen + (batch.to(tl.int64) * kv_heads + kv_head) * k_len
        load_key = load_key & (tl.load(seen_ptr + offs_n, mask=load_key, other=0) != 0)
    bounds_at = (batch.to(tl.int64) * tl.cdiv(k_len, BLOCK_N) + block) * 2
    last_n = tl.minimum(start_n + BLOCK_N, k_len) - 1
    m_start, m_end, full_start, full_end = query_bounds(start_n, last_n, batch, view, masks, bounds_at, BLOCK_M)

    memory_key = (first_key + start_n).to(tl.int64)
    key_indices = memory_key + block_keys  # [BLOCK_N]
    k, v = from_row(k, batch, kv_head, memory_key, ALIGNED), from_row(v, batch, kv_head, memory_key, ALIGNED)
    k_ptrs = k.ptr + tile_offsets(block_keys, BLOCK_D, k.s, k.d, WIDE)  # [BLOCK_N, BLOCK_D]
    k_tile = load_tile(k_ptrs, load_key, HEAD_DIM)  # [BLOCK_N, BLOCK_D]
    v_ptrs = v.ptr + tile_offsets(block_keys, BLOCK_DV, v.s, v.d, WIDE)  # [BLOCK_N, BLOCK_DV]
    v_tile = load_tile(v_ptrs, load_key, VALUE_DIM)  # [BLOCK_N, BLOCK_DV]
    if tangents.k is not None:
        t_k = from_row(tangents.k, batch, kv_head, memory_key, ALIGNED)
        t_k_ptrs = t_k.ptr + tile_offsets(block_keys, BLOCK_D, t_k.s, t_k.d, WIDE)
        t_k_tile = load_tile(t_k_ptrs, load_key, HEAD_DIM)  # [BLOCK_N, BLOCK_D]
    if tangents.v is not None:
        t_v = from_row(tangents.v, batch, kv_head, memory_key, ALIGNED)
        t_v_ptrs = t_v.ptr + tile_offsets(block_keys, BLOCK_DV, t_v.s, t_v.d, WIDE)
        t_v_tile = load_tile(t_v_ptrs, load_key, VALUE_DIM)  # [BLOCK_N, BLOCK_DV]
    if terms.key_scale is not None:
        scale_ptrs = vector_from(terms.key_scale, batch, kv_head, 0, key_indices)
        key_scales = tl.load(scale_ptrs, mask=load_key, other=0.0)  # [BLOCK_N]
        key_size = key_scales
        if tangents.key_scale is not None:
            scale_ptrs = vector_from(tangents.key_scale, batch, kv_head, 0, key_indices)
            t_key_scales = tl.load(scale_ptrs, mask=load_key, other=0.0)  # [BLOCK_N]
            key_size = tl.maximum(tl.abs(key_scales), tl.abs(t_key_scales))  # as rows have it in the other pass
            key_size = tl.where(key_size == 0.0, 1.0, key_size)
            of_key, t_of_key = key_scales / key_size, t_key_scales / key_size  # [BLOCK_N]
    if factor_size is not None:
        factor_size = 1.0 / tl.load(factor_size + batch * kv_heads + kv_head)

    OF_PAIRS: tl.constexpr = tangents.bias is not None or tangents.relative_bias is not None
    OF_BIASES: tl.constexpr = OF_PAIRS or tangents.key_bias is not None
    AFTER: tl.constexpr = terms.bias_after_softcap is not None
    HAS_PAIRS: tl.constexpr = terms.bias is not None or terms.relative_bias is not None
    shift = k_len - q_len + first_key - first_row  # of `pair_terms`
    if terms.relative_bias is not None:
        shift += relative_right
    if HAS_PAIRS:  # whole blocks are loaded without masks
        full_end = tl.where(start_n + BLOCK_N > k_len, full_start, full_end)
    keys = (first_key + offs_n)[:, None]  # [BLOCK_N, 1], in the packed axis
    dk = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)  # [BLOCK_N, BLOCK_D]
    dv = tl.zeros([BLOCK_N, BLOCK_DV], tl.float32)  # [BLOCK_N, BLOCK_DV]
    d_t_k, d_t_v = dk, dv
    d_key_scale = tl.zeros([BLOCK_N, KEY_SUM_COLUMNS], tl.float32)  # [BLOCK_N, KEY_SUM_COLUMNS]
    d_t_key_scale = d_key_scale
    MASKED_M: tl.constexpr = BLOCK_M // 2 if BLOCK_M >= 64 else BLOCK_M  # see `attention_forward`
    for index in range(0, group):
        head = kv_head * group + index
        batch_head = batch * q_heads + head
        q_head = from_row(q, batch, head, first_row, ALIGNED)
        do_head = from_row(d_out, batch, head, first_row, ALIGNED)
        if tangents.q is not None:
            t_q_head = from_row(tangents.q, batch, head, first_row, ALIGNED)
        first_term = batch_head.to(tl.int64) * packed_rows + first_row
        d_key_bias = tl.zeros([BLOCK_N, KEY_SUM_COLUMNS], tl.float32)  # [BLOCK_N, KEY_SUM_COLUMNS]
        d_t_key_bias = d_key_bias
        key_biases = tl.zeros([BLOCK_N, 1], tl.float32)  # [BLOCK_N, 1]
        t_key_biases = key_biases
        if terms.key_bias is not None:
            bias_ptrs = vector_from(terms.key_bias, batch, kv_head, index, key_indices)
            key_biases = (tl.load(bias_ptrs, mask=load_key, other=0.0) * LOG2_E)[:, None]  # [BLOCK_N, 1]
        if tangents.key_bias is not None:
            t_bias_ptrs = vector_from(tangents.key_bias, batch, kv_head, index, key_indices)
            t_key_biases = tl.load(t_bias_ptrs, mask=load_key, other=0.0)[:, None]  # [BLOCK_N, 1]
        for PASS in tl.static_range(0, 2):
            if PASS != UNMASKED or (masks.mask is None and masks.key_ranges is None):
                step = tl.arange(0, BLOCK_M if PASS == UNMASKED else MASKED_M)  # [M]
                _, _, loop_start, loop_end, gap_start, gap = pass_bounds(
                    m_start, m_end, full_start, full_end, step.shape[0], PASS, False
                )
                for position in tl.range(loop_start, loop_end, step.shape[0]):
                    start_m = position
                    if PASS != UNMASKED:
                        start_m = tl.where(position >= gap_start, position + gap, position)
                    start_m = tl.multiple_of(start_m, step.shape[0])
                    offs_m = start_m + step  # [M]
                    first_m = start_m.to(tl.int64)
                    rows = (first_row + offs_m)[None, :]  # [1, M], in the packed axis
                    live = tl.full(step.shape, 1, tl.int1)  # [M]
                    if PASS != UNMASKED:
                        live = offs_m < q_len
                    term_offsets = first_term + offs_m
                    exponent_term = tl.load(row_terms.exponent + term_offsets, mask=live, other=float("-inf"))  # [M]
                    live = live & (exponent_term != float("-inf"))
                    mean = tl.load(row_terms.mean + term_offsets, mask=live, other=0.0)  # [M]
                    delta = tl.load(row_terms.delta + term_offsets, mask=live, other=0.0)  # [M]
                    eta = tl.load(row_terms.eta + term_offsets, mask=live, other=0.0)  # [M]
                    factor = tl.full(step.shape, 1.0, tl.float32)  # [M]
                    if terms.query_scale is not None:
                        factor_ptrs = vector_from(terms.query_scale, batch, head, 0, first_row + offs_m)
                        factor = tl.load(factor_ptrs, mask=live, other=0.0)
                    if tangents.query_scale is not None:
                        factor_ptrs = vector_from(tangents.query_scale, batch, head, 0, first_row + offs_m)
                        t_factor = tl.load(factor_ptrs, mask=live, other=0.0)  # [M]
                    is_read = live[None, :]  # [1, M]
                    if PASS != UNMASKED:
                        is_read = visible_rows(offs_m, live, offs_n, row_lo, row_hi, batch, head, view, masks.mask)
                        is_read = is_read & live[None, :] & load_key[:, None]  # [BLOCK_N, M]
                    biases, t_biases = key_biases, t_key_biases
                    if HAS_PAIRS:  # see `attention_forward`
                        biases = biases + pair_terms(terms, extent, batch, head, rows, keys, shift, is_read)[0]
                    if OF_PAIRS:
                        t_pairs = pair_terms(tangents, extent, batch, head, rows, keys, shift, is_read)[0]
                        t_biases = t_biases + t_pairs * LN_2  # [BLOCK_N, M]
                    q_ptrs = q_head.ptr + first_m * q_head.s + tile_offsets(step, BLOCK_D, q_head.s, q_head.d, WIDE)
                    q_tile = load_tile(q_ptrs, live, HEAD_DIM)  # [M, BLOCK_D]
                    s = tl.dot(k_tile, q_tile.T, input_precision="ieee")  # [BLOCK_N, M]
                    t_s = tl.zeros_like(s)
                    if tangents.k is not None:
                        t_s = tl.dot(t_k_tile, q_tile.T, t_s, input_precision="ieee")  # [BLOCK_N, M]
                    if tangents.q is not None:
                        t_q_offsets = tile_offsets(step, BLOCK_D, t_q_head.s, t_q_head.d, WIDE)
                        t_q_tile = load_tile(t_q_head.ptr + first_m * t_q_head.s + t_q_offsets, live, HEAD_DIM)
                        t_s = tl.dot(k_tile, t_q_tile.T, t_s, input_precision="ieee")  # [BLOCK_N, M]
                    scaled, t_scaled = s, t_s
                    if terms.key_scale is not None:
                        scaled, t_scaled = s * key_scales[:, None], t_s * key_scales[:, None]
                        if tangents.key_scale is not None:
                            t_scaled = tl.fma(s, t_key_scales[:, None], t_scaled)
                    factors = (factor * (scale * LOG2_E))[None, :]  # [1, M]
                    exponent, capped = exponents(
                        scaled, factors, biases if HAS_BIAS else None, exponent_term, softcap, terms, 0
                    )
                    p = tl.exp2(exponent)  # [BLOCK_N, M]
                    t_x = t_scaled * (factor * scale)[None, :]  # [BLOCK_N, M]
                    if tangents.query_scale is not None:
                        t_x = tl.fma(scaled, (t_factor * scale)[None, :], t_x)
                    if OF_BIASES and not AFTER:
                        t_x += t_biases
                    if PASS != UNMASKED:
                        p, t_x = tl.where(is_read, p, 0.0), tl.where(is_read, t_x, 0.0)
                    do_offsets = tile_offsets(step, BLOCK_DV, do_head.s, do_head.d, WIDE)
                    do = load_tile(do_head.ptr + first_m * do_head.s + do_offsets, live, VALUE_DIM)  # [M, BLOCK_DV]
                    dp = tl.dot(v_tile, do.T, input_precision="ieee")  # [BLOCK_N, M]
                    if tangents.v is not None:
                        t_dp = tl.dot(t_v_tile, do.T, input_precision="ieee")  # [BLOCK_N, M]
                    weights = p
                    if dropout_ptr is not None:
                        kept = dropout_keeps(dropout_ptr, keep_from, batch_head, rows, first_key + start_n, BLOCK_N)
                        weights = tl.where(kept, p, 0.0)
                        dp = tl.where(kept, dp * keep_scale, 0.0)
                        if tangents.v is not None:
                            t_dp = tl.where(kept, t_dp * keep_scale, 0.0)
                    t_z, d_z, d_t_z, d_x, d_t_x = gradients_of_tangent(
                        p,
                        dp,
                        t_dp if tangents.v is not None else None,
                        t_x,
                        t_biases if OF_BIASES and AFTER else None,
                        capped,
                        mean[None, :],
                        delta[None, :],
                        eta[None, :],
                        softcap,
                    )
                    if gradients.v is not None:
                        t_weights = (weights * (t_z - mean[None, :])).to(do.dtype)  # [BLOCK_N, M]
                        dv = tl.dot(t_weights, do, dv, input_precision="ieee")  # [BLOCK_N, BLOCK_DV]
                    if t_gradients.v is not None:
                        d_t_v = tl.dot(weights.to(do.dtype), do, d_t_v, input_precision="ieee")
                    d_biases, d_t_biases = d_x, d_t_x
                    if AFTER:
                        d_biases, d_t_biases = d_z, d_t_z
                    if gradients.key_bias is not None:
                        d_key_bias += partial_sums(d_biases, KEY_SUM_COLUMNS)
                    if t_gradients.key_bias is not None:
                        d_t_key_bias += partial_sums(d_t_biases, KEY_SUM_COLUMNS)
                    store_pair_gradients(gradients, d_biases, extent, batch, head, rows, keys, shift, is_read)
                    store_pair_gradients(t_gradients, d_t_biases, extent, batch, head, rows, keys, shift, is_read)
                    if factor_size is not None:
                        d_x *= factor_size
                        d_t_x *= factor_size
                    if tangents.query_scale is not None:
                        d_x = tl.fma(d_x, factor[None, :], d_t_x * t_factor[None, :])
                    elif terms.query_scale is not None:
                        d_x *= factor[None, :]
                    if terms.query_scale is not None:
                        d_t_x *= factor[None, :]
                    if gradients.key_scale is not None:
                        d_key_scale += partial_sums(tl.fma(d_x, s, d_t_x * t_s), KEY_SUM_COLUMNS)
                    if t_gradients.key_scale is not None:
                        d_t_key_scale += partial_sums(d_t_x * s, KEY_SUM_COLUMNS)
                    if tangents.key_scale is not None:
                        d_x = tl.fma(d_x, of_key[:, None], d_t_x * t_of_key[:, None])
                        d_t_x *= of_key[:, None]
                    if gradients.k is not None:
                        dk = tl.dot(d_x.to(q_tile.dtype), q_tile, dk, input_precision="ieee")  # [BLOCK_N, BLOCK_D]
                        if tangents.q is not None:
                            dk = tl.dot(d_t_x.to(q_tile.dtype), t_q_tile, dk, input_precision="ieee")
                    if t_gradients.k is not None:
                        d_t_k = tl.dot(d_t_x.to(q_tile.dtype), q_tile, d_t_k, input_precision="ieee")
        head_base = batch_head.to(tl.int64) * packed_len + memory_key
        if gradients.key_bias is not None:
            tl.store(gradients.key_bias + head_base + block_keys, tl.sum(d_key_bias, 1), mask=keep_key)
        if t_gradients.key_bias is not None:
            tl.store(t_gradients.key_bias + head_base + block_keys, tl.sum(d_t_key_bias, 1), mask=keep_key)

    of_sums = tl.full([BLOCK_N], 1.0, tl.float32) * scale  # [BLOCK_N]
    if factor_size is not None:
        of_sums /= factor_size
    key_base = (batch.to(tl.int64) * kv_heads + kv_head) * packed_len + memory_key
    if gradients.key_scale is not None:
        tl.store(gradients.key_scale + key_base + block_keys, tl.sum(d_key_scale, 1) * of_sums, mask=keep_key)
    if t_gradients.key_scale is not None:
        tl.store(t_gradients.key_scale + key_base + block_keys, tl.sum(d_t_key_scale, 1) * of_sums, mask=keep_key)
    if terms.key_scale is not None:
        of_sums *= key_size
    offsets = key_base * HEAD_DIM + tile_offsets(block_keys, BLOCK_D, HEAD_DIM, 1, False)  # [BLOCK_N, BLOCK_D]
    keep_k = keep_key[:, None] & (tl.arange(0, BLOCK_D)[None, :] < HEAD_DIM)
    if gradients.k is not None:
        dk *= of_sums[:, None]
        tl.store(gradients.k + offsets, dk.to(gradients.k.dtype.element_ty), mask=keep_k)
    if t_gradients.k is not None:
        d_t_k *= of_sums[:, None]
        tl.store(t_gradients.k + offsets, d_t_k.to(t_gradients.k.dtype.element_ty), mask=keep_k)
    v_offsets = key_base * VALUE_DIM + tile_offsets(block_keys, BLOCK_DV, VALUE_DIM, 1, False)  # [BLOCK_N, BLOCK_DV]
    keep_v = keep_key[:, None] & (tl.arange(0, BLOCK_DV)[None, :] < VALUE_DIM)
    if gradients.v is not None:
        dv *= keep_scale
        tl.store(gradients.v + v_offsets, dv.to(gradients.v.dtype.element_ty), mask=keep_v)
    if t_gradients.v is not None:
        d_t_v *= keep_scale
        tl.store(t_gradients.v + v_offsets, d_t_v.to(t_gradients.v.dtype.element_ty), mask=keep_v)
