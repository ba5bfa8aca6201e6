"""Tangent kernel: the derivative of attention along tangents of its tensors, and row terms of that one's gradient."""

from __future__ import annotations

from collections.abc import Hashable
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...core.call import AttentionCall
from ...core.terms import TERMS, Gradients, Terms
from .attention import Prepared, launch_kernel, new_results, prepared
from .block import (
    LENGTHS,
    from_row,
    load_tile,
    program_in_section,
    sequence_bounds,
    tile_offsets,
    vector_from,
)
from .grids import over_rows
from .launch import KERNELS, forms_of, is_aligned, is_wide
from .pairs import UNMASKED, dropout_keeps, key_bounds, key_range, pair_terms, pass_bounds, visible
from .records import RECORDS, Arguments, Results, SecondTerms, Strided, Tangents, View
from .softmax import LN_2, LOG2_E, before_rounding, exponents, joint_peak, partial_sums, soft_cap_slope

Saved = tuple[Tensor, Tensor, Tensor | None]  # out, lse and rounding of a forward


@triton.jit(do_not_specialize=[*LENGTHS, "group"])
def attention_tangent(
    q,
    k,
    v,
    d_out,
    tangents,
    terms,
    extent,
    relative_right,
    results,
    d_lse_ptr,
    out_tangent_ptr,
    lse_tangent_ptr,
    row_terms,
    masks,
    scale,
    softcap,
    sinks,
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
    """Tangents of out and lse for BLOCK_M rows of one (batch or sequence, head), as `attention_forward`; t_: a tangent.

        w[i, j]    = exp(z[i, j] - lse[i])                      P = share * w, share[i] = exp(lse[i]) / total[i]
        t_x[i, j]  = scale * (query_scale[i] * (t_s[i, j] * key_scale[j] + s[i, j] * t_key_scale[j])
                              + t_query_scale[i] * s[i, j] * key_scale[j]) + t_b[i, j]
        s[i, j]    = q[i] . k[j],  t_s[i, j] = t_q[i] . k[j] + q[i] . t_k[j]
        t_z[i, j]  = t_x[i, j] * dz/dx                          with bias_after_softcap, t_b is added here
        t_lse[i]   = sum_j w[i, j] * t_z[i, j]
        mean[i]    = share[i] * t_lse[i] + (1 - share[i]) * t_sinks[i]
        t_out[i]   = share[i] * sum_j keep[i, j] * keep_scale * w[i, j] * (t_z[i, j] * v[j] + t_v[j]) - mean[i] * out[i]

    The softmax is known from lse: one pass over the keys, of 5 products a tile, 3 where only q has a tangent; of the
    row terms as many, two for d_out . v and d_out . t_v in place of those that make out's tangent. With 16 bits of
    that, eta's error would pass the gradients' where keys have means, as delta's in `attention_row_terms`.

    w * t_z is rounded to v's dtype before the product. In tiles with a mask, which alone have rows of few keys, the
    mean of t_out is that of the rounded values, so that a tangent that all keys share cancels. In fp32 sums are divided
    by that of w, which is not 1 where lse is rounded.

    tangents      `Tangents`; a tangent that is None costs nothing
    results       `Results` of the forward: out, rounding (or None) and lse
    out_tangent   [B, Hq, Sq, Dv] in out's dtype, lse_tangent fp32 [B, Hq, Sq]; contiguous, or None
    row_terms     `SecondTerms`, all None where there is no d_out. Of the gradients d_out and d_lse of both tangents:

        exponent[i]  = -log2(total[i])                          -inf for a row without keys
        dp[i, j]     = keep[i, j] * keep_scale * (d_out[i] . v[j]),  t_dp likewise of t_v
        of_out[i]    = share[i] * sum_j w[i, j] * dp[i, j]                                      d_out . out
        of_t_out[i]  = share[i] * sum_j w[i, j] * (t_z[i, j] * dp[i, j] + t_dp[i, j]) - mean[i] * of_out[i]
        delta[i]     = of_out[i] - d_lse[i] / share[i]
        eta[i]       = of_t_out[i] - d_lse[i] / share[i] * (mean[i] - t_lse[i])
        d_sinks[i]   = (share[i] - 1) * ((t_sinks[i] - mean[i]) * of_out[i] + of_t_out[i])
        d_t_sinks[i] = (share[i] - 1) * of_out[i]
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

    lse = tl.load(results.lse + row_offsets, mask=keep_row, other=float("-inf"))  # [BLOCK_M]
    live = lse != float("-inf")
    lse2 = tl.where(live, lse * LOG2_E, 0.0)
    exponent_term = tl.where(live, -lse2, float("-inf"))
    factor = tl.full([BLOCK_M], 1.0, tl.float32) * (scale * LOG2_E)  # [BLOCK_M]
    if terms.query_scale is not None:
        scale_ptrs = vector_from(terms.query_scale, batch, head, 0, memory_row + block_rows)
        factor *= tl.load(scale_ptrs, mask=live, other=0.0)
    if tangents.query_scale is not None:
        scale_ptrs = vector_from(tangents.query_scale, batch, head, 0, memory_row + block_rows)
        t_factor = tl.load(scale_ptrs, mask=live, other=0.0) * scale  # [BLOCK_M], not in base 2
    q = from_row(q, batch, head, memory_row, ALIGNED)
    q_tile = load_tile(q.ptr + tile_offsets(block_rows, BLOCK_D, q.s, q.d, WIDE), live, HEAD_DIM)  # [BLOCK_M, BLOCK_D]
    if tangents.q is not None:
        t_q = from_row(tangents.q, batch, head, memory_row, ALIGNED)
        t_q_ptrs = t_q.ptr + tile_offsets(block_rows, BLOCK_D, t_q.s, t_q.d, WIDE)
        t_q_tile = load_tile(t_q_ptrs, live, HEAD_DIM)  # [BLOCK_M, BLOCK_D]

    if row_terms.delta is not None:
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
    kv_start, kv_end, full_start, full_end = key_bounds(
        start_m, tl.minimum(start_m + BLOCK_M, q_len) - 1, lo, hi, batch, view, BLOCK_N, masks.mask is not None
    )

    OF_PRODUCT: tl.constexpr = tangents.q is not None or tangents.k is not None or tangents.key_scale is not None
    OF_PAIRS: tl.constexpr = tangents.bias is not None or tangents.relative_bias is not None
    OF_BIASES: tl.constexpr = OF_PAIRS or tangents.key_bias is not None
    MOVES: tl.constexpr = OF_PRODUCT or OF_BIASES or tangents.query_scale is not None  # logits have a tangent
    IS_FP32: tl.constexpr = v.ptr.dtype.element_ty.primitive_bitwidth == 32
    ROUNDS: tl.constexpr = out_tangent_ptr is not None and not IS_FP32
    AFTER: tl.constexpr = terms.bias_after_softcap is not None
    HAS_PAIRS: tl.constexpr = terms.bias is not None or terms.relative_bias is not None
    shift = k_len - q_len + first_key - first_row  # of `pair_terms`
    if terms.relative_bias is not None:
        shift += relative_right
    rows = (first_row + offs_m)[:, None]  # [BLOCK_M, 1], in the packed axis
    acc = tl.zeros([BLOCK_M, BLOCK_DV], tl.float32)  # [BLOCK_M, BLOCK_DV]
    moved = tl.zeros([BLOCK_M, SUM_COLUMNS], tl.float32)  # [BLOCK_M, SUM_COLUMNS]
    of_out, of_t_out, weights = moved, moved, moved
    lost = tl.zeros([BLOCK_M], tl.float32)  # [BLOCK_M]
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
                if HAS_PAIRS:  # loaded before the product, lest the softmax take the layout of the loads
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
                        t_s = tl.fma(s, tl.load(key_scale_ptrs, mask=load_key, other=0.0)[None, :], t_s)
                    s *= key_scales
                if terms.key_bias is not None:
                    bias_ptrs = vector_from(terms.key_bias, batch, kv_head, head % group, first_key + offs_n)
                    of_keys = (tl.load(bias_ptrs, mask=load_key, other=0.0) * LOG2_E)[None, :]  # [1, N]
                    biases = biases + of_keys if HAS_PAIRS else of_keys
                if tangents.key_bias is not None:
                    bias_ptrs = vector_from(tangents.key_bias, batch, kv_head, head % group, first_key + offs_n)
                    of_keys = tl.load(bias_ptrs, mask=load_key, other=0.0)[None, :]  # [1, N]
                    t_biases = t_biases + of_keys if OF_PAIRS else of_keys
                exponent, capped = exponents(
                    s, factor[:, None], biases if HAS_BIAS else None, exponent_term, softcap, terms, 1
                )
                w = tl.exp2(exponent)  # [BLOCK_M, N]
                if PASS != UNMASKED:
                    w = tl.where(is_read, w, 0.0)
                if IS_FP32:
                    weights += partial_sums(w, SUM_COLUMNS)
                t_z = t_s * (factor * LN_2)[:, None]  # [BLOCK_M, N]
                if tangents.query_scale is not None:
                    t_z = tl.fma(s, t_factor[:, None], t_z)
                if OF_BIASES and not AFTER:
                    t_z += t_biases
                if softcap is not None:
                    t_z *= soft_cap_slope(capped, softcap)
                if OF_BIASES and AFTER:
                    t_z += t_biases
                if PASS != UNMASKED:
                    t_z = tl.where(is_read, t_z, 0.0)
                if MOVES:
                    moved += partial_sums(w * t_z, SUM_COLUMNS)
                    if ROUNDS and PASS != UNMASKED:
                        rounded = (w * t_z).to(v.ptr.dtype.element_ty).to(tl.float32)  # [BLOCK_M, N]
                        lost += tl.sum(rounded - w * t_z, 1)
                if dropout_ptr is not None:
                    batch_head, first = batch * q_heads + head, first_key + start_n
                    w = tl.where(dropout_keeps(dropout_ptr, keep_from, batch_head, rows, first, step.shape[0]), w, 0.0)
                if MOVES or row_terms.delta is not None:
                    v_ptrs = v.ptr + first_n * v.s + tile_offsets(step, BLOCK_DV, v.s, v.d, WIDE)
                    v_tile = load_tile(v_ptrs, load_key, VALUE_DIM)  # [N, BLOCK_DV]
                if tangents.v is not None:
                    t_v_ptrs = t_v.ptr + first_n * t_v.s + tile_offsets(step, BLOCK_DV, t_v.s, t_v.d, WIDE)
                    t_v_tile = load_tile(t_v_ptrs, load_key, VALUE_DIM)  # [N, BLOCK_DV]
                if row_terms.delta is not None:
                    dp = w * tl.dot(do, v_tile.T, input_precision="ieee")  # [BLOCK_M, N]
                    of_out += partial_sums(dp, SUM_COLUMNS)
                    t_dp = t_z * dp  # [BLOCK_M, N]
                    if tangents.v is not None:
                        t_dp = tl.fma(w, tl.dot(do, t_v_tile.T, input_precision="ieee"), t_dp)
                    of_t_out += partial_sums(t_dp, SUM_COLUMNS)
                if out_tangent_ptr is not None and MOVES:
                    acc = tl.dot((w * t_z).to(v_tile.dtype), v_tile, acc, input_precision="ieee")
                if out_tangent_ptr is not None and tangents.v is not None:
                    acc = tl.dot(w.to(t_v_tile.dtype), t_v_tile, acc, input_precision="ieee")  # [BLOCK_M, BLOCK_DV]

    t_lse = tl.sum(moved, 1)
    kept = keep_scale if dropout_ptr is not None else 1.0
    if IS_FP32:
        total = tl.where(live, tl.sum(weights, 1), 1.0)  # [BLOCK_M]
        t_lse, kept = t_lse / total, kept / total
    total2, share, of_sink, t_sink = lse2, 1.0, 0.0, 0.0
    if sinks is not None:
        sink = tl.load(vector_from(sinks, batch, head, 0, memory_row + block_rows), mask=live, other=0.0)
        peak, weight, of_sink = joint_peak(lse2, sink * LOG2_E)
        total2 = peak + tl.log2(weight + of_sink)
        share, of_sink = weight / (weight + of_sink), of_sink / (weight + of_sink)
        if tangents.sinks is not None:
            sink_ptrs = vector_from(tangents.sinks, batch, head, 0, memory_row + block_rows)
            t_sink = tl.load(sink_ptrs, mask=live, other=0.0)
    none = tl.zeros([BLOCK_M], tl.float32)  # [BLOCK_M]
    mean = tl.fma(t_lse, share, none + of_sink * t_sink)  # [BLOCK_M]
    if lse_tangent_ptr is not None:
        tl.store(lse_tangent_ptr + row_offsets, t_lse, mask=keep_row)
    if out_tangent_ptr is not None:
        offsets = row_base * VALUE_DIM + tile_offsets(block_rows, BLOCK_DV, VALUE_DIM, 1, False)  # [BLOCK_M, BLOCK_DV]
        out = load_tile(results.out + offsets, live, VALUE_DIM)  # [BLOCK_M, BLOCK_DV]
        if results.rounding is not None:
            out = before_rounding(out, load_tile(results.rounding + offsets, live, VALUE_DIM))
        centre = tl.fma(lost, share, mean)  # [BLOCK_M]
        t_out = acc * (none + share * kept)[:, None] - centre[:, None] * out.to(tl.float32)
        keep_out = keep_row[:, None] & (tl.arange(0, BLOCK_DV)[None, :] < VALUE_DIM)
        tl.store(out_tangent_ptr + offsets, t_out.to(out_tangent_ptr.dtype.element_ty), mask=keep_out)
    if row_terms.delta is not None:
        delta, eta = tl.sum(of_out, 1) * (share * kept), tl.sum(of_t_out, 1) * (share * kept)  # [BLOCK_M]
        eta = tl.fma(-mean, delta, eta)
        if row_terms.d_sinks is not None:
            d_sinks = -of_sink * tl.fma(t_sink - mean, delta, eta)
            tl.store(row_terms.d_sinks + row_offsets, tl.where(live, d_sinks, 0.0), mask=keep_row)
        if row_terms.d_t_sinks is not None:
            tl.store(row_terms.d_t_sinks + row_offsets, tl.where(live, -of_sink * delta, 0.0), mask=keep_row)
        if d_lse_ptr is not None:  # past 2^126: see `attention_row_terms`
            gap = total2 - lse2
            d_lse = tl.load(d_lse_ptr + row_offsets, mask=live, other=0.0)
            d_lse = tl.where(gap == float("inf"), 0.0, d_lse * tl.exp2(tl.minimum(gap, 126.0)))
            delta, eta = delta - d_lse, tl.fma(-d_lse, mean - t_lse, eta)
        tl.store(row_terms.exponent + row_offsets, tl.where(live, -total2, float("-inf")), mask=keep_row)
        tl.store(row_terms.mean + row_offsets, mean, mask=keep_row)
        tl.store(row_terms.delta + row_offsets, delta, mask=keep_row)
        tl.store(row_terms.eta + row_offsets, eta, mask=keep_row)


KERNELS["tangent"] = attention_tangent


def tangent(call: AttentionCall, saved: Saved, tangents: Gradients) -> tuple[Tensor, Tensor]:
    """The tangents of out, in v's dtype, and of lse; saved: out, lse and rounding of `forward`."""
    out, lse, rounding = saved
    ready = with_tangents(call, tangents, rounding=rounding is not None)
    t_out, t_lse = new_results(ready.call, out, out.dtype), new_results(ready.call, lse)
    launch_tangent(ready, saved, {"out_tangent_ptr": t_out, "lse_tangent_ptr": t_lse})
    return t_out, t_lse


def with_tangents(
    call: AttentionCall, tangents: Gradients, d_out: Tensor | None = None, selects: Hashable = (), **asked: Any
) -> Prepared:
    """The call as `prepared`, with `Tangents` among its arguments. selects: what else selects code."""
    q, k, v = (None if x is None else _aligned(x.to(call.v.dtype)) for x in tangents[:3])
    terms = Terms(1.0, *tangents[3:])
    ready = prepared(call, d_out, (selects, *forms_of(terms, q, k, v)), **asked)
    operands = (None if x is None else Strided(x, *x.stride()) for x in (q, k, v))
    there = ((term, x) for term, x in zip(TERMS, terms, strict=True) if term.gradient and x is not None)
    record = Tangents(*operands, **{term.name: RECORDS[term.form](x) for term, x in there})
    return ready._replace(arguments={**ready.arguments, "tangents": record}, tangents=tangents)


def _aligned(x: Tensor) -> Tensor:
    """The tensor, or a contiguous copy where it is not aligned, or one whose offsets need 64 bits."""
    return x if is_aligned(x) and not is_wide(x) else x.clone(memory_format=torch.contiguous_format)


def launch_tangent(ready: Prepared, saved: Saved, arguments: Arguments) -> None:
    """Launch the kernel with some of its results: both tangents, or the row terms of their gradient."""
    out, lse, rounding = saved
    rounding = None if rounding is None else rounding.contiguous()
    results = Results(out.contiguous(), rounding, lse.contiguous(), None, None)
    absent = dict.fromkeys(("d_lse_ptr", "out_tangent_ptr", "lse_tangent_ptr"))
    given = {**absent, "results": results, "row_terms": SecondTerms(*[None] * 6), **arguments}
    launch_kernel("tangent", ready, given, over_rows)
