"""Backward, the pass over keys: gradients of k, v, vectors of keys and biases of pairs, without atomics."""

from __future__ import annotations

import triton
import triton.language as tl

from .block import (
    LENGTHS,
    from_row,
    load_term,
    load_tile,
    program_in_section,
    sequence_bounds,
    terms_offset,
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
    whole_blocks,
)
from .records import View
from .softmax import LN_2, LOG2_E, exponents, gradients_of, partial_sums, softcap_of_rows


@triton.jit(do_not_specialize=LENGTHS, do_not_specialize_on_alignment=["group"])
def attention_grad_key_value(
    q_descriptor,  # first: see `attention_forward`
    d_out_descriptor,
    q,
    k,
    v,
    d_out,
    terms,
    extent,
    relative_right,
    row_terms_ptr,
    of_exponents_ptr,
    factor_size,
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
    splits,
    part_rows,
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
    SPLIT_TERMS: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    WIDE: tl.constexpr,
    ALIGNED: tl.constexpr,
    INVARIANT: tl.constexpr,
    NUM_XCDS: tl.constexpr,
    WARP_SPECIALIZE: tl.constexpr,
):
    """Gradients of k, v, key_scale and biases for BLOCK_N keys of one (batch or sequence, kv head); names as in
    `attention_grad_query`.

        d_v[j]         = sum_i keep[i, j] * keep_scale * P[i, j] * d_out[i]
        raw[j]         = scale * sum_i dX[i, j] * query_scale[i] * r[i, j] * q[i]    over the rows of the group's heads
        d_k[j]         = key_scale[j] * raw[j]
        d_key_scale[j] = k[j] . raw[j]                                       never divided by key_scale, which may be 0
        d_b[i, j]      = dX[i, j], or dS[i, j] behind the softcap            b: the biases of `attention_forward`
        d_key_bias[j]  = sum_i d_b[i, j]                                     over the rows of one head of the group
        d_bias[i, j] = d_relative_bias[i, i + Sk - Sq - j + relative_right] = d_b[i, j]
        d_r[i, j] = dX[i, j] * scale * (q[i] . k[j]) * query_scale[i] * key_scale[j]    r: of the relative scale

    Grid: (size of a section, blocks of the longest Sk times splits, sections), see `program_in_section`. Sums run in
    one fixed order inside a program: bitwise repeatable.

    *_descriptor     tensor descriptors of q and d_out with blocks [1, 1, BLOCK_M, BLOCK_D or BLOCK_DV], or None
    row_terms        of `attention_row_terms`, which hold query_scale: with it, dS * factor is one fma, and log2(e) is
                     taken out once at the end. With a bias the factor comes later: dX itself is added up first
    of_exponents     of `attention_row_terms`, or None
    factor_size      fp32 [B, Hkv] or None: the largest |factor| of the group, never 0. dS * factor / factor_size is
                     rounded to 16 bits, so that a small factor does not push it below fp16's range
    gradients        `TensorGradients`: k [B, Hkv, Sk, D] and v [B, Hkv, Sk, Dv] contiguous; key_scale [B, Hkv, Sk] and
                     key_bias [B, Hkv, group, Sk] in fp32, contiguous or None; terms of pairs `Strided` fp32
                     [B, Hq, Sq, Sk or extent] or None: visible pairs are written, once each
    splits           None, or the number of programs that share the rows of a group's heads: results are then parts for
                     `add_splits`, all fp32, each of part_rows = B * Hkv * Sk keys; the key bias's hold zeros before
    """
    kv_heads = q_heads // group
    block, kv_head, sequence = program_in_section(kv_heads, first_head, first_y, first_z, False, NUM_XCDS)
    if sequence < 0:
        return
    if splits is not None:
        split, block = block % splits, block // splits
    packed_len = k_len
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
    if terms.key_scale is not None:
        scale_ptrs = vector_from(terms.key_scale, batch, kv_head, 0, key_indices)
        key_scales = tl.load(scale_ptrs, mask=load_key, other=0.0)  # [BLOCK_N]
    of_sums = LN_2  # of dS * factor: it has log2(e), or lacks `scale`
    if row_terms_ptr.dtype.element_ty == tl.float32:
        of_sums = scale
    if factor_size is not None:
        factor_size = 1.0 / tl.load(factor_size + batch * kv_heads + kv_head)

    HAS_PAIRS: tl.constexpr = terms.bias is not None or terms.relative_bias is not None
    READS_PAIRS: tl.constexpr = HAS_PAIRS or terms.relative_scale is not None
    shift = k_len - q_len + first_key - first_row  # of `pair_terms`
    if relative_right is not None:
        shift += relative_right
    if READS_PAIRS:  # whole blocks are loaded without masks
        full_end = tl.where(start_n + BLOCK_N > k_len, full_start, full_end)
    keys = (first_key + offs_n)[:, None]  # [BLOCK_N, 1], in the packed axis
    dk = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)  # [BLOCK_N, BLOCK_D]
    dv = tl.zeros([BLOCK_N, BLOCK_DV], tl.float32)  # [BLOCK_N, BLOCK_DV]
    FIRST: tl.constexpr = 1 if INVARIANT and right is None else 0
    MASKED_M: tl.constexpr = BLOCK_M // 2 if BLOCK_M >= 64 and not INVARIANT else BLOCK_M  # see `attention_forward`
    first, last = 0, group  # of the heads of a group
    if splits is not None:
        first_block = m_start // BLOCK_M
        blocks = tl.maximum(tl.cdiv(m_end, BLOCK_M) - first_block, 1)  # of rows, one head after another
        share = tl.cdiv(group * blocks, splits)
        share_end = tl.minimum((split + 1) * share, group * blocks)
        first, last = split * share // blocks, tl.cdiv(share_end, blocks)
    for index in range(first, last):
        row_start, row_end, whole_start, whole_end = m_start, m_end, full_start, full_end
        if splits is not None:
            begin = (first_block + split * share - index * blocks) * BLOCK_M
            end = (first_block + share_end - index * blocks) * BLOCK_M
            row_start, row_end = tl.maximum(m_start, begin), tl.minimum(m_end, end)
            full_lo, full_hi = tl.maximum(full_start, begin), tl.minimum(full_end, end)
            whole_start, whole_end = whole_blocks(row_start, full_lo, full_hi, BLOCK_M, False)
        head = kv_head * group + index
        batch_head = batch * q_heads + head
        q_head = from_row(q, batch, head, first_row, ALIGNED)
        do_head = from_row(d_out, batch, head, first_row, ALIGNED)
        first_term = terms_offset(batch, head, sequence, first_row, q_heads, terms_len, masks.q_starts)
        term_ptr = row_terms_ptr + 2 * first_term
        d_key_bias = tl.zeros([BLOCK_N, KEY_SUM_COLUMNS], tl.float32)  # [BLOCK_N, KEY_SUM_COLUMNS]
        if terms.key_bias is not None:
            bias_ptrs = vector_from(terms.key_bias, batch, kv_head, index, key_indices)
            key_biases = (tl.load(bias_ptrs, mask=load_key, other=0.0) * LOG2_E)[:, None]  # [BLOCK_N, 1]
        for PASS in tl.static_range(FIRST, 3 if INVARIANT else 2):
            if PASS != UNMASKED or (masks.mask is None and masks.key_ranges is None):
                step = tl.arange(0, BLOCK_M if PASS == UNMASKED else MASKED_M)  # [M]
                _, _, loop_start, loop_end, gap_start, gap = pass_bounds(
                    row_start, row_end, whole_start, whole_end, step.shape[0], PASS, INVARIANT
                )
                q_offsets = tile_offsets(step, BLOCK_D, q_head.s, q_head.d, WIDE)  # [M, BLOCK_D]
                do_offsets = tile_offsets(step, BLOCK_DV, do_head.s, do_head.d, WIDE)  # [M, BLOCK_DV]
                one = tl.full(step.shape, 1.0, tl.float32)  # [M]
                next_terms = term_ptr + 2 * (loop_start + step)  # carried along: 4 % fewer instructions, sm_80 at D 128
                for position in tl.range(
                    loop_start, loop_end, step.shape[0], warp_specialize=WARP_SPECIALIZE and PASS == UNMASKED
                ):
                    start_m = position
                    if PASS != UNMASKED:
                        start_m = tl.where(position >= gap_start, position + gap, position)
                    start_m = tl.multiple_of(start_m, step.shape[0])
                    offs_m = start_m + step  # [M]
                    rows = (first_row + offs_m)[None, :]  # [1, M], in the packed axis
                    term_ptrs = next_terms if PASS == UNMASKED else term_ptr + 2 * offs_m
                    exponent_term, factor = load_term(term_ptrs, one * (scale * LOG2_E), SPLIT_TERMS)  # [M]
                    live = tl.full(step.shape, 1, tl.int1)  # [M]
                    if PASS != UNMASKED:
                        live = exponent_term != float("-inf")
                    biases = None
                    if READS_PAIRS:  # see `attention_forward`
                        is_read = live[None, :]  # [1, M]
                        if PASS != UNMASKED:
                            keep = visible_rows(offs_m, live, offs_n, row_lo, row_hi, batch, head, view, masks.mask)
                            is_read = is_read & load_key[:, None] & keep  # [BLOCK_N, M]
                        of_pairs, of_distance = pair_terms(terms, extent, batch, head, rows, keys, shift, is_read)
                    if HAS_PAIRS:
                        biases = of_pairs
                        if terms.key_bias is not None:
                            biases += key_biases
                    elif terms.key_bias is not None:
                        biases = key_biases
                    if PASS != UNMASKED or q_descriptor is None:
                        q_tile = load_tile(q_head.ptr + start_m.to(tl.int64) * q_head.s + q_offsets, live, HEAD_DIM)
                        do = load_tile(do_head.ptr + start_m.to(tl.int64) * do_head.s + do_offsets, live, VALUE_DIM)
                    else:
                        q_tile = q_descriptor.load([batch, head, first_row + start_m, 0]).reshape(q_offsets.shape)
                        do = d_out_descriptor.load([batch, head, first_row + start_m, 0]).reshape(do_offsets.shape)
                    s = tl.dot(k_tile, q_tile.T, input_precision="ieee")  # [BLOCK_N, M]
                    if terms.key_scale is not None:
                        s *= key_scales[:, None]
                    product = s
                    if terms.relative_scale is not None:
                        s *= of_distance
                    cap = softcap
                    if terms.query_scale_after_softcap is not None:
                        cap = softcap_of_rows(softcap, factor, scale)  # [M]
                    exponent, capped = exponents(s, factor[None, :], biases, exponent_term, cap, terms, 0)
                    p = tl.exp2(exponent)  # [BLOCK_N, M]
                    if PASS != UNMASKED:
                        keep = visible_rows(offs_m, live, offs_n, row_lo, row_hi, batch, head, view, masks.mask)
                        p = tl.where(keep, p, 0.0)
                    dp = tl.dot(v_tile, do.T, input_precision="ieee")  # [BLOCK_N, M]
                    weights = p
                    if dropout_ptr is not None:
                        kept = dropout_keeps(dropout_ptr, keep_from, batch_head, rows, first_key + start_n, BLOCK_N)
                        weights = tl.where(kept, p, 0.0)
                        dp = tl.where(kept, dp * keep_scale, 0.0)
                    if of_exponents_ptr is not None:
                        of_exponents = tl.load(of_exponents_ptr + first_term + offs_m)  # [M]
                        log_p = tl.minimum(
                            tl.maximum(exponent, -256.0), 1.0
                        )  # [BLOCK_N, M], see `attention_grad_query`
                        dp = tl.fma(log_p, of_exponents[None, :], dp)
                    gradient_term, gradient_factor = load_term(term_ptrs + 1, one, SPLIT_TERMS)
                    dv = tl.dot(weights.to(do.dtype), do, dv, input_precision="ieee")  # [BLOCK_N, BLOCK_DV]
                    if factor_size is not None:
                        gradient_factor *= factor_size
                        if not HAS_BIAS:
                            gradient_term *= factor_size
                    if not HAS_BIAS:
                        ds = p * tl.fma(dp, gradient_factor[None, :], gradient_term[None, :])  # [BLOCK_N, M]
                    else:  # the gradient of a logit is that of its biases before it meets the factor
                        ds = p * tl.fma(dp, one[None, :], gradient_term[None, :])  # + would join the product's sum
                    ds, d_biases = gradients_of(ds, capped, cap, terms, 0)
                    if gradients.key_bias is not None:
                        d_key_bias += partial_sums(d_biases, KEY_SUM_COLUMNS)
                    if HAS_PAIRS:
                        store_pair_gradients(gradients, d_biases, extent, batch, head, rows, keys, shift, is_read)
                    if HAS_BIAS:
                        ds *= gradient_factor[None, :]
                    if gradients.relative_scale is not None:
                        d_pairs = ds * product * of_sums  # [BLOCK_N, M]
                        if factor_size is not None:
                            d_pairs /= factor_size
                        of_row = from_row(gradients.relative_scale, batch, head, rows, False)
                        entry = rows + shift - keys  # [BLOCK_N, M], as in `pair_terms`
                        inside = is_read & (entry.to(tl.uint32) < tl.cast(extent, tl.uint32))
                        tl.store(of_row.ptr + entry.to(tl.int64) * of_row.d, d_pairs, mask=inside)
                    if terms.relative_scale is not None:
                        ds *= of_distance
                    dk = tl.dot(ds.to(q_tile.dtype), q_tile, dk, input_precision="ieee")  # [BLOCK_N, BLOCK_D]
                    next_terms += 2 * step.shape[0]
        if gradients.key_bias is not None:
            head_base = batch_head.to(tl.int64) * packed_len + memory_key
            if splits is not None:
                head_base += split.to(tl.int64) * part_rows * group
            tl.store(gradients.key_bias + head_base + block_keys, tl.sum(d_key_bias, 1), mask=keep_key)

    if factor_size is not None:
        of_sums = LN_2 / factor_size
    dk *= of_sums
    if dropout_ptr is not None:
        dv *= keep_scale
    key_base = (batch.to(tl.int64) * kv_heads + kv_head) * packed_len + memory_key
    if splits is not None:
        key_base += split.to(tl.int64) * part_rows
    if terms.key_scale is not None:
        if gradients.key_scale is not None:
            # Keys are loaded again, under another policy, lest the compiler take both loads for one: held through the
            # loop, they spill 550 to 690 bytes in fp32 at D 128 (sm_80, sm_90, sm_100; static, triton 3.9).
            keep = load_key[:, None] & (tl.arange(0, BLOCK_D)[None, :] < HEAD_DIM)
            again = tl.load(k_ptrs, mask=keep, other=0.0, eviction_policy="evict_first")  # [BLOCK_N, BLOCK_D]
            d_key_scale = tl.sum(again.to(tl.float32) * dk, 1)
            tl.store(gradients.key_scale + key_base + block_keys, d_key_scale, mask=keep_key)
        dk *= key_scales[:, None]
    d_k_ptrs = gradients.k + key_base * HEAD_DIM + tile_offsets(block_keys, BLOCK_D, HEAD_DIM, 1, False)
    d_v_ptrs = gradients.v + key_base * VALUE_DIM + tile_offsets(block_keys, BLOCK_DV, VALUE_DIM, 1, False)
    keep_k = keep_key[:, None] & (tl.arange(0, BLOCK_D)[None, :] < HEAD_DIM)
    keep_v = keep_key[:, None] & (tl.arange(0, BLOCK_DV)[None, :] < VALUE_DIM)
    tl.store(d_k_ptrs, dk.to(gradients.k.dtype.element_ty), mask=keep_k)
    tl.store(d_v_ptrs, dv.to(gradients.v.dtype.element_ty), mask=keep_v)
