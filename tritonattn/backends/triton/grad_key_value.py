"""Backward, the pass over keys: gradients of k, v, vectors of keys and biases of pairs, without atomics."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...core.call import AttentionCall
from ...core.terms import Gradients, Needs
from .attention import largest, launch_kernel, new_results
from .block import (
    LENGTHS,
    LN_2,
    LOG2_E,
    UNMASKED,
    dropout_keeps,
    from_row,
    load_term,
    load_tile,
    pair_biases,
    partial_sums,
    pass_bounds,
    program_in_section,
    sequence_bounds,
    soft_cap,
    soft_cap_slope,
    terms_offset,
    tile_offsets,
    vector_from,
    whole_blocks,
)
from .combine import add_splits, new_parts
from .device import Grid
from .launch import KERNELS, Plan, Specialisation, strided
from .records import Arguments, View


@triton.jit
def rows_of_keys(offs_n, keep, seen_ptr, batch, view):
    """(first_row, last_row, keep) of keys: the rows that attend to each, key_ranges apart, and keep less hidden keys.

    seen_ptr   uint8 [Sk] of the head, or None: keys that are visible to some row
    """
    row = offs_n - (view.k_len - view.q_len)
    first_row = tl.zeros(offs_n.shape, tl.int32)
    last_row = first_row
    if view.right is not None:
        first_row = row - view.right
    if view.left is not None:
        last_row = row + view.left
        keep = keep & (last_row >= 0)
    if view.key_lengths is not None:
        unpadded = offs_n < tl.load(view.key_lengths + batch)
        first_row = tl.where(unpadded, first_row, view.q_len)
        keep = keep & unpadded
    if seen_ptr is not None:
        keep = keep & (tl.load(seen_ptr + offs_n, mask=keep, other=0) != 0)
    return first_row, last_row, keep


@triton.jit
def query_bounds(first, last, batch, view, bounds_ptr, BLOCK_M: tl.constexpr, MASKED: tl.constexpr):
    """(m_start, m_end, full_start, full_end) of the keys first .. last, both below k_len: as `block.key_bounds`.

    bounds_ptr   int32 [2] of this block, or None: the first row and one past the last row whose key_ranges touch it
    MASKED       all blocks of rows need a mask, as they do with key_ranges
    """
    shift = view.k_len - view.q_len
    m_start = first * 0
    m_end = m_start + view.q_len
    full_lo, full_hi = m_start, m_end
    if view.right is not None:
        m_start = tl.maximum(first - shift - view.right, 0)
        full_lo = tl.maximum(last - shift - view.right, 0)
    if view.left is not None:
        m_end = tl.maximum(tl.minimum(last - shift + view.left + 1, view.q_len), 0)
        full_hi = tl.maximum(tl.minimum(first - shift + view.left + 1, view.q_len), 0)
    if view.key_lengths is not None:
        length = tl.load(view.key_lengths + batch)
        m_end = tl.where(first < length, m_end, 0)
        full_hi = tl.where(last < length, full_hi, 0)
    if bounds_ptr is not None:
        m_start = tl.maximum(m_start, tl.load(bounds_ptr))
        m_end = tl.minimum(m_end, tl.load(bounds_ptr + 1))
    full_start, full_end = whole_blocks(m_start, full_lo, full_hi, BLOCK_M, MASKED or bounds_ptr is not None)
    return m_start, m_end, full_start, full_end


@triton.jit
def visible_rows(offs_m, keep_row, offs_n, first_row, last_row, batch, head, view, mask):
    """The visible pairs [BLOCK_N, M]: first_row <= i <= last_row, the ranges of the rows, and the dense mask."""
    keep = offs_m[None, :] >= first_row[:, None]
    if view.left is not None:
        keep = keep & (offs_m[None, :] <= last_row[:, None])
    if view.key_ranges is not None:
        bounds = view.key_ranges + (batch.to(tl.int64) * view.q_len + offs_m) * 2
        lo, hi = tl.load(bounds, mask=keep_row, other=0), tl.load(bounds + 1, mask=keep_row, other=0)
        keep = keep & (offs_n[:, None] >= lo[None, :]) & (offs_n[:, None] < hi[None, :])
    if mask is not None:
        inside = (offs_n < view.k_len)[:, None] & (offs_m < view.q_len)[None, :]
        offsets = offs_n.to(tl.int64)[:, None] * mask.d + offs_m.to(tl.int64)[None, :] * mask.s
        keep = keep & (tl.load(from_row(mask, batch, head, 0, False).ptr + offsets, mask=inside, other=0) != 0)
    return keep


@triton.jit(do_not_specialize=LENGTHS, do_not_specialize_on_alignment=["group"])
def attention_grad_key_value(
    q_descriptor,  # first: see `attention_forward`
    d_out_descriptor,
    q,
    k,
    v,
    d_out,
    key_scale,
    key_bias,
    bias,
    relative_bias,
    extent,
    relative_right,
    terms_ptr,
    factor_size,
    key_lengths,
    key_ranges,
    q_starts,
    k_starts,
    row_bounds_ptr,
    mask,
    seen_ptr,
    d_k_ptr,
    d_v_ptr,
    d_key_scale_ptr,
    d_key_bias_ptr,
    d_bias,
    d_relative_bias,
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
    BIAS_AFTER: tl.constexpr,
    WIDE: tl.constexpr,
    ALIGNED: tl.constexpr,
    INVARIANT: tl.constexpr,
    LANES: tl.constexpr,
    WARP_SPECIALIZE: tl.constexpr,
):
    """Gradients of k, v, key_scale and biases for BLOCK_N keys of one (batch or sequence, kv head); names as in
    `attention_grad_query`.

        d_v[j]         = sum_i keep[i, j] * keep_scale * P[i, j] * d_out[i]
        raw[j]         = scale * sum_i dX[i, j] * query_scale[i] * q[i]      over the rows of all heads of the group
        d_k[j]         = key_scale[j] * raw[j]
        d_key_scale[j] = k[j] . raw[j]                                       never divided by key_scale, which may be 0
        d_b[i, j]      = dX[i, j], or with BIAS_AFTER dS[i, j]               b: the biases of `attention_forward`
        d_key_bias[j]  = sum_i d_b[i, j]                                     over the rows of one head of the group
        d_bias[i, j] = d_relative_bias[i, i + Sk - Sq - j + relative_right] = d_b[i, j]

    Grid: (size of a section, blocks of the longest Sk times splits, sections), see `program_in_section`. Sums run in
    one fixed order inside a program: bitwise repeatable.

    *_descriptor     tensor descriptors of q and d_out with blocks [1, 1, BLOCK_M, BLOCK_D or BLOCK_DV], or None
    terms            of `attention_row_terms`: with query_scale, dS * factor is one fma, and log2(e) is taken out once
                     at the end. With key_bias the factor comes later: dX itself is added up first
    factor_size      fp32 [B, Hkv] or None: the largest |factor| of the group, never 0. dS * factor / factor_size is
                     rounded to 16 bits, so that a small factor does not push it below fp16's range
    row_bounds_ptr   int32 [B, cdiv(Sk, BLOCK_N), 2] with key_ranges, of `ranges.row_bounds_kernel`
    d_k, d_v         [B, Hkv, Sk, D] and [B, Hkv, Sk, Dv] contiguous; d_key_scale fp32 [B, Hkv, Sk] and d_key_bias
                     fp32 [B, Hkv, group, Sk] contiguous or None
    d_bias, d_relative_bias   `Strided` fp32 [B, Hq, Sq, Sk or extent] or None: visible pairs are written, once each
    splits           None, or the number of programs that share the rows of a group's heads: results are then parts for
                     `add_splits`, all fp32, each of part_rows = B * Hkv * Sk keys; d_key_bias holds zeros before
    """
    kv_heads = q_heads // group
    block, kv_head, sequence = program_in_section(kv_heads, first_head, first_y, first_z, False, LANES)
    if sequence < 0:
        return
    if splits is not None:
        split, block = block % splits, block // splits
    packed_len = k_len
    batch, first_row, first_key, q_len, k_len = sequence_bounds(sequence, q_len, k_len, q_starts, k_starts)
    start_n = block * BLOCK_N
    if q_starts is not None:
        if start_n >= k_len:
            return
    view = View(q_len, k_len, left, right, key_lengths, key_ranges)
    block_keys = tl.arange(0, BLOCK_N)
    offs_n = start_n + block_keys  # [BLOCK_N]
    keep_key = offs_n < k_len  # [BLOCK_N]
    if seen_ptr is not None:
        seen_ptr += (batch.to(tl.int64) * kv_heads + kv_head) * k_len
    row_lo, row_hi, load_key = rows_of_keys(offs_n, keep_key, seen_ptr, batch, view)  # [BLOCK_N]
    if row_bounds_ptr is not None:
        row_bounds_ptr += (batch.to(tl.int64) * tl.cdiv(k_len, BLOCK_N) + block) * 2
    m_start, m_end, full_start, full_end = query_bounds(
        start_n, tl.minimum(start_n + BLOCK_N, k_len) - 1, batch, view, row_bounds_ptr, BLOCK_M, mask is not None
    )

    memory_key = (first_key + start_n).to(tl.int64)
    key_indices = memory_key + block_keys  # [BLOCK_N]
    k, v = from_row(k, batch, kv_head, memory_key, ALIGNED), from_row(v, batch, kv_head, memory_key, ALIGNED)
    k_ptrs = k.ptr + tile_offsets(block_keys, BLOCK_D, k.s, k.d, WIDE)  # [BLOCK_N, BLOCK_D]
    k_tile = load_tile(k_ptrs, load_key, HEAD_DIM)  # [BLOCK_N, BLOCK_D]
    v_ptrs = v.ptr + tile_offsets(block_keys, BLOCK_DV, v.s, v.d, WIDE)  # [BLOCK_N, BLOCK_DV]
    v_tile = load_tile(v_ptrs, load_key, VALUE_DIM)  # [BLOCK_N, BLOCK_DV]
    if key_scale is not None:
        scale_ptrs = vector_from(key_scale, batch, kv_head, 0, key_indices)
        key_scales = tl.load(scale_ptrs, mask=load_key, other=0.0)  # [BLOCK_N]
    if factor_size is not None:
        factor_size = 1.0 / tl.load(factor_size + batch * kv_heads + kv_head)

    HAS_PAIRS: tl.constexpr = bias is not None or relative_bias is not None
    shift = k_len - q_len + first_key - first_row  # of `pair_biases`
    if relative_bias is not None:
        shift += relative_right
    if HAS_PAIRS:  # whole blocks are loaded without masks
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
        term_ptr = terms_ptr + 2 * terms_offset(batch, head, sequence, first_row, q_heads, terms_len, q_starts)
        d_key_bias = tl.zeros([BLOCK_N, KEY_SUM_COLUMNS], tl.float32)  # [BLOCK_N, KEY_SUM_COLUMNS]
        if key_bias is not None:
            bias_ptrs = vector_from(key_bias, batch, kv_head, index, key_indices)
            key_biases = (tl.load(bias_ptrs, mask=load_key, other=0.0) * LOG2_E)[:, None]  # [BLOCK_N, 1]
        for PASS in tl.static_range(FIRST, 3 if INVARIANT else 2):
            if PASS != UNMASKED or (mask is None and key_ranges is None):
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
                    if HAS_PAIRS:  # see `attention_forward`
                        is_read = live[None, :]  # [1, M]
                        if PASS != UNMASKED:
                            keep = visible_rows(offs_m, live, offs_n, row_lo, row_hi, batch, head, view, mask)
                            is_read = is_read & load_key[:, None] & keep  # [BLOCK_N, M]
                        biases = pair_biases(bias, relative_bias, extent, batch, head, rows, keys, shift, is_read)
                        if key_bias is not None:
                            biases += key_biases
                    elif key_bias is not None:
                        biases = key_biases
                    if PASS != UNMASKED or q_descriptor is None:
                        q_tile = load_tile(q_head.ptr + start_m.to(tl.int64) * q_head.s + q_offsets, live, HEAD_DIM)
                        do = load_tile(do_head.ptr + start_m.to(tl.int64) * do_head.s + do_offsets, live, VALUE_DIM)
                    else:
                        q_tile = q_descriptor.load([batch, head, first_row + start_m, 0]).reshape(q_offsets.shape)
                        do = d_out_descriptor.load([batch, head, first_row + start_m, 0]).reshape(do_offsets.shape)
                    s = tl.dot(k_tile, q_tile.T, input_precision="ieee")  # [BLOCK_N, M]
                    if key_scale is not None:
                        s *= key_scales[:, None]
                    if softcap is None:
                        if HAS_BIAS:
                            exponent = tl.fma(s, factor[None, :], biases) + exponent_term[None, :]
                        else:
                            exponent = tl.fma(s, factor[None, :], exponent_term[None, :])
                    elif BIAS_AFTER:
                        capped = soft_cap(s * factor[None, :], softcap)
                        exponent = capped + biases + exponent_term[None, :]
                    else:
                        x = tl.fma(s, factor[None, :], biases) if HAS_BIAS else s * factor[None, :]
                        capped = soft_cap(x, softcap)
                        exponent = capped + exponent_term[None, :]
                        if HAS_BIAS:
                            exponent = tl.where(biases == float("-inf"), float("-inf"), exponent)
                    p = tl.exp2(exponent)  # [BLOCK_N, M]
                    if PASS != UNMASKED:
                        keep = visible_rows(offs_m, live, offs_n, row_lo, row_hi, batch, head, view, mask)
                        p = tl.where(keep, p, 0.0)
                    dp = tl.dot(v_tile, do.T, input_precision="ieee")  # [BLOCK_N, M]
                    weights = p
                    if dropout_ptr is not None:
                        kept = dropout_keeps(dropout_ptr, keep_from, batch_head, rows, first_key + start_n, BLOCK_N)
                        weights = tl.where(kept, p, 0.0)
                        dp = tl.where(kept, dp * keep_scale, 0.0)
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
                    d_biases = ds
                    if softcap is not None:
                        ds *= soft_cap_slope(capped, softcap)
                        if not BIAS_AFTER:
                            d_biases = ds
                    if d_key_bias_ptr is not None:
                        d_key_bias += partial_sums(d_biases, KEY_SUM_COLUMNS)
                    if d_bias is not None:
                        d_row = from_row(d_bias, batch, head, rows, False)
                        tl.store(d_row.ptr + keys.to(tl.int64) * d_row.d, d_biases, mask=is_read)
                    if d_relative_bias is not None:
                        d_row, entry = from_row(d_relative_bias, batch, head, rows, False), rows + shift - keys
                        is_read = is_read & (entry.to(tl.uint32) < tl.cast(extent, tl.uint32))
                        tl.store(d_row.ptr + entry.to(tl.int64) * d_row.d, d_biases, mask=is_read)
                    if HAS_BIAS:
                        ds *= gradient_factor[None, :]
                    dk = tl.dot(ds.to(q_tile.dtype), q_tile, dk, input_precision="ieee")  # [BLOCK_N, BLOCK_D]
                    next_terms += 2 * step.shape[0]
        if d_key_bias_ptr is not None:
            head_base = batch_head.to(tl.int64) * packed_len + memory_key
            if splits is not None:
                head_base += split.to(tl.int64) * part_rows * group
            tl.store(d_key_bias_ptr + head_base + block_keys, tl.sum(d_key_bias, 1), mask=keep_key)

    if terms_ptr.dtype.element_ty == tl.float32:
        dk *= scale
    elif factor_size is None:
        dk *= LN_2
    else:
        dk *= LN_2 / factor_size
    if dropout_ptr is not None:
        dv *= keep_scale
    key_base = (batch.to(tl.int64) * kv_heads + kv_head) * packed_len + memory_key
    if splits is not None:
        key_base += split.to(tl.int64) * part_rows
    if key_scale is not None:
        if d_key_scale_ptr is not None:
            # Keys are loaded again, under another policy, lest the compiler take both loads for one: held through the
            # loop, they spill 550 to 690 bytes in fp32 at D 128 (sm_80, sm_90, sm_100; static, triton 3.9).
            keep = load_key[:, None] & (tl.arange(0, BLOCK_D)[None, :] < HEAD_DIM)
            again = tl.load(k_ptrs, mask=keep, other=0.0, eviction_policy="evict_first")  # [BLOCK_N, BLOCK_D]
            d_key_scale = tl.sum(again.to(tl.float32) * dk, 1)
            tl.store(d_key_scale_ptr + key_base + block_keys, d_key_scale, mask=keep_key)
        dk *= key_scales[:, None]
    d_k_ptrs = d_k_ptr + key_base * HEAD_DIM + tile_offsets(block_keys, BLOCK_D, HEAD_DIM, 1, False)
    d_v_ptrs = d_v_ptr + key_base * VALUE_DIM + tile_offsets(block_keys, BLOCK_DV, VALUE_DIM, 1, False)
    keep_k = keep_key[:, None] & (tl.arange(0, BLOCK_D)[None, :] < HEAD_DIM)
    keep_v = keep_key[:, None] & (tl.arange(0, BLOCK_DV)[None, :] < VALUE_DIM)
    tl.store(d_k_ptrs, dk.to(d_k_ptr.dtype.element_ty), mask=keep_k)
    tl.store(d_v_ptrs, dv.to(d_v_ptr.dtype.element_ty), mask=keep_v)


KERNELS["grad_key_value"] = attention_grad_key_value


def grad_key_value(
    specialisation: Specialisation, call: AttentionCall, arguments: Arguments, needs: Needs, d_out: Tensor
) -> Gradients:
    """The gradients of k, v, key_scale and the three biases."""
    terms, bias = call.logits, call.logits.key_bias
    d_k = new_results(call, call.k, torch.float32 if specialisation.problem.wide_k else call.k.dtype)
    d_v = new_results(call, call.v, call.v.dtype)
    d_key_scale = new_results(call, call.k.select(3, 0)) if needs.key_scale else None
    d_key_bias = new_results(call, bias) if bias is not None and needs.key_bias else None
    arguments |= {"d_k_ptr": d_k, "d_v_ptr": d_v, "d_key_scale_ptr": d_key_scale, "d_key_bias_ptr": d_key_bias}
    arguments |= {"factor_size": None, "row_bounds_ptr": None, "d_bias": None, "d_relative_bias": None}
    of_pairs, table = {}, terms.relative_bias
    if terms.bias is not None and needs.bias:
        of_pairs["bias"] = _of_pairs(call, call.visibility.k_len)
    if table is not None and needs.relative_bias:
        of_pairs["relative_bias"] = _of_pairs(call, table.shape[3])
    arguments |= {f"d_{name}": strided(x) for name, x in of_pairs.items()}
    if terms.query_scale is not None and call.q.dtype == torch.float16:
        factor = terms.query_scale * (terms.scale * LOG2_E.value)
        arguments["factor_size"] = largest(factor.unflatten(1, (call.visibility.kv_heads, -1)).flatten(2))
    launch_kernel("grad_key_value", specialisation, call, arguments, d_out, _in_splits)
    for name, x in of_pairs.items():  # sums, in fp32 and one order, over the axes that a bias has once
        bias = getattr(terms, name)
        of_pairs[name] = x.sum_to_size(bias.shape).to(bias.dtype)
    d_k, d_v = d_k if needs.k else None, d_v if needs.v else None
    return Gradients(k=d_k, v=d_v, key_scale=d_key_scale, key_bias=d_key_bias, **of_pairs)


def _of_pairs(call: AttentionCall, width: int) -> Tensor:
    """Zeros [B, Hq, Sq, width] for the gradient of a bias of pairs: the kernel writes the visible ones."""
    padded = -(-width // 16) * 16  # rows begin where wide stores can
    return call.q.new_zeros((*call.q.shape[:3], padded), dtype=torch.float32)[..., :width]


def _in_splits(
    chosen: Plan, grid: Grid, arguments: Arguments, specialisation: Specialisation, call: AttentionCall
) -> None:
    """Launch with the rows of each key shared out among splits, and add their parts up."""
    names = ("d_k_ptr", "d_v_ptr", "d_key_scale_ptr", "d_key_bias_ptr")
    results = {name: arguments[name] for name in names if arguments[name] is not None}
    splits = arguments["splits"]
    parts = {name: new_parts(call, x, splits) for name, x in results.items()}
    if "d_key_bias_ptr" in parts:
        parts["d_key_bias_ptr"].zero_()  # a split writes the heads that it has rows of
    chosen.launch(grid, arguments | parts, specialisation)
    for name, result in results.items():
        add_splits(specialisation, parts[name], result)
