"""The gradients of a call: terms of its rows, which both passes need, then a pass over rows and one over keys."""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...core.call import AttentionCall, RowGradients
from ...core.terms import AXES, PAIRS, Gradients, Needs
from ...tuning.config import ROW_TERMS_ALIGNMENT as ALIGNMENT
from .attention import (
    Prepared,
    aligned_copy,
    largest,
    launch_kernel,
    new_results,
    one_layout,
    prepared,
    seen_scales,
)
from .block import (
    LENGTHS,
    ROW_TERMS_ALIGNMENT,
    from_row,
    load_tile,
    program_position,
    sequence_bounds,
    store_term,
    terms_offset,
    tile_offsets,
    vector_from,
)
from .combine import add_splits, new_parts
from .device import Grid
from .grad_key_value import attention_grad_key_value
from .grad_query import attention_grad_query
from .grids import over_keys, over_row_terms, over_rows
from .launch import KERNELS, Plan
from .ranges import rows_of_key_blocks
from .records import Arguments, Results, Strided, TensorGradients, View
from .softmax import LN_2, LOG2_E, before_rounding, joint_peak


@triton.jit(do_not_specialize=LENGTHS)
def attention_row_terms(
    results,
    d_out,
    d_lse_ptr,
    d_entropy_ptr,
    query_scale,
    q_starts,
    k_starts,
    row_terms_ptr,
    delta_ptr,
    of_exponents_ptr,
    d_sinks_ptr,
    scale,
    sinks,
    q_len,
    terms_len,
    q_heads,
    first_y,
    first_z,
    VALUE_DIM: tl.constexpr,
    BLOCK_DV: tl.constexpr,
    BLOCK_M: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    WIDE: tl.constexpr,
    ALIGNED: tl.constexpr,
    INVARIANT: tl.constexpr,
):
    """Row terms of the softmax's derivative, for BLOCK_M rows of one (batch or sequence, head).

        total[i]   = exp(lse[i]) + exp(sinks[i])               without sinks, no second term
        lse2[i]    = log2(total[i]), +inf for a row without keys, so that its probabilities come out as 0
        delta[i]   = sum_c out[i, c] * d_out[i, c] - d_lse[i] * total[i] / exp(lse[i])
                     + d_entropy[i] * total[i] / exp(lse[i]) * (entropy[i] + ln total[i] - lse[i])
        of_exponents[i] = -ln(2) * d_entropy[i] * total[i] / exp(lse[i])    only with d_entropy
        factor[i]  = scale * log2(e) * query_scale[i]          only with query_scale
        d_sinks[i] = -exp(sinks[i]) / total[i] * sum_c out[i, c] * d_out[i, c]

    where out is what it was before it was rounded: with 16 bits of it, delta's error times the mean key passes d_q
    where keys and values have means (arXiv:2510.04212 traces training that diverges to such rounding).

    Grid: (blocks of the longest Sq rounded up to ROW_TERMS_ALIGNMENT, Hq, sequences).
    results     `Results` of the forward: out, rounding (int8, what out lost when it was rounded, or None), lse, and
                with d_entropy entropy
    d_out       `Strided` [B, Hq, Sq, Dv]; d_lse, d_entropy and d_sinks fp32 [B, Hq, Sq], contiguous, or None
    delta       fp32 [B, Hq, terms_len], contiguous; `terms_offset` says where a row stands. Rows between a
                sequence's end and the next multiple are as rows without keys, so that no reader needs a bound
    of_exponents    like delta, or None: what multiplies log2(P[i, j]) in dP[i, j]
    terms       [B, Hq, terms_len, 2], contiguous: what a fma adds to logits and to dP. -lse2 and -delta in fp32, or
                with query_scale -lse2 and -delta * factor, each with factor in an int64: `load_term`. With a
                bias (HAS_BIAS) -delta stays without factor
    """
    block, head, sequence = program_position(first_y, first_z, LAST_FIRST=False)
    packed_len = q_len
    batch, first_row, _, q_len, _ = sequence_bounds(sequence, q_len, q_len, q_starts, k_starts)
    block_rows = tl.arange(0, BLOCK_M)
    offs_m = block * BLOCK_M + block_rows  # [BLOCK_M]
    keep_row = offs_m < q_len  # [BLOCK_M]
    memory_row = (first_row + block * BLOCK_M).to(tl.int64)
    row_base = (batch.to(tl.int64) * q_heads + head.to(tl.int64)) * packed_len + memory_row
    row_offsets = row_base + block_rows
    term_offsets = terms_offset(batch, head, sequence, first_row, q_heads, terms_len, q_starts) + offs_m
    keep_term = offs_m < tl.cdiv(q_len, ROW_TERMS_ALIGNMENT) * ROW_TERMS_ALIGNMENT

    lse = tl.load(results.lse + row_offsets, mask=keep_row, other=float("-inf"))  # [BLOCK_M]
    live = lse != float("-inf")
    out_offsets = tile_offsets(block_rows, BLOCK_DV, VALUE_DIM, 1, False)  # [BLOCK_M, BLOCK_DV]
    out = load_tile(results.out + row_base * VALUE_DIM + out_offsets, live, VALUE_DIM)  # [BLOCK_M, BLOCK_DV]
    if results.rounding is not None:
        rounding_ptrs = results.rounding + row_base * VALUE_DIM + out_offsets
        out = before_rounding(out, load_tile(rounding_ptrs, live, VALUE_DIM))
    d_out = from_row(d_out, batch, head, memory_row, ALIGNED)
    do = load_tile(d_out.ptr + tile_offsets(block_rows, BLOCK_DV, d_out.s, d_out.d, WIDE), live, VALUE_DIM)
    delta = tl.sum(out.to(tl.float32) * do.to(tl.float32), 1)  # [BLOCK_M]
    lse2 = tl.where(live, lse * LOG2_E, 0.0)
    total2 = lse2
    if sinks is not None:
        sink = tl.load(vector_from(sinks, batch, head, 0, memory_row + block_rows), mask=live, other=0.0)
        peak, weight, of_sink = joint_peak(lse2, sink * LOG2_E)
        total2 = peak + tl.log2(weight + of_sink)
        if d_sinks_ptr is not None:
            d_sinks = tl.where(live, -of_sink / (weight + of_sink) * delta, 0.0)
            tl.store(d_sinks_ptr + row_offsets, d_sinks, mask=keep_row)
    if d_lse_ptr is not None:
        d_lse = tl.load(d_lse_ptr + row_offsets, mask=live, other=0.0)
        # Past 2^126 the keys' share is not a number of fp32, and neither is what d_lse brings to them.
        gap = total2 - lse2
        delta -= tl.where(gap == float("inf"), 0.0, d_lse * tl.exp2(tl.minimum(gap, 126.0)))
    if d_entropy_ptr is not None:
        d_entropy = tl.load(d_entropy_ptr + row_offsets, mask=live, other=0.0)
        entropy = tl.load(results.entropy + row_offsets, mask=live, other=0.0)
        above = total2 - lse2
        is_far = above == float("inf")
        of_exponents = tl.where(is_far, 0.0, d_entropy * tl.exp2(tl.minimum(above, 126.0)) * LN_2)
        delta += of_exponents * (entropy * LOG2_E + tl.where(is_far, 0.0, above))
        tl.store(of_exponents_ptr + term_offsets, -of_exponents, mask=keep_term)
    factor = None
    gradient_term = -delta
    tl.store(delta_ptr + term_offsets, delta, mask=keep_term)
    if query_scale is not None:
        scale_ptrs = vector_from(query_scale, batch, head, 0, memory_row + block_rows)
        factor = tl.load(scale_ptrs, mask=live, other=0.0) * (scale * LOG2_E)
        if not HAS_BIAS:
            gradient_term *= factor
    exponent_term = tl.where(live, -total2, float("-inf"))
    store_term(row_terms_ptr + 2 * term_offsets, exponent_term, factor, keep_term)
    store_term(row_terms_ptr + 2 * term_offsets + 1, gradient_term, factor, keep_term)


KERNELS |= {
    "row_terms": attention_row_terms,
    "grad_query": attention_grad_query,
    "grad_key_value": attention_grad_key_value,
}


class RowTerms(NamedTuple):
    """The results of `attention_row_terms`, which states shapes, the corrected ones, and d_lse: a record of kernels."""

    d_lse: Tensor | None
    d_sinks: Tensor | None
    terms: Tensor
    corrected: Tensor | None
    delta: Tensor
    of_exponents: Tensor | None


def backward(
    call: AttentionCall,
    out: Tensor,
    lse: Tensor,
    d_out: Tensor,
    d_rows: RowGradients,
    needs: Needs,
    rounding: Tensor | None = None,
) -> Gradients:
    """Compute the gradients of a call by the row-terms, grad_query and grad_key_value kernels.

    out, lse and rounding as `forward` left them; d_out [B, Hq, Sq, Dv] in out's dtype and d_rows fp32, any strides.
    """
    fp32_grad_q, fp32_grad_k = call.q.dtype != call.v.dtype, call.k.dtype != call.v.dtype
    d_out = one_layout(d_out) if call.visibility.invariant else aligned_copy(d_out)
    ready = prepared(
        call,
        d_out,
        (needs, d_rows.entropy is not None),
        aux=d_rows.lse is not None,
        rounding=rounding is not None,
        query_scale_grad=needs.query_scale,
        fp32_grad_q=fp32_grad_q,
        fp32_grad_k=fp32_grad_k,
        is_part=call.is_part,
    )
    rounding = None if rounding is None else rounding.contiguous()
    d_lse, _, d_entropy, entropies = d_rows
    if d_entropy is not None and entropies is not None:
        d_entropy, entropies = d_entropy.contiguous(), entropies.contiguous()
    d_rows = RowGradients(None if d_lse is None else d_lse.contiguous(), None, d_entropy, entropies)
    results = Results(out.contiguous(), rounding, lse.contiguous(), None, entropies)
    of_pairs = needs.key_bias
    for name in PAIRS:
        of_pairs = of_pairs or getattr(needs, name)
    # The pass over keys reads the terms that the one over rows corrects.
    corrects_keys = (needs.k or needs.key_scale) and ready.specialisation.problem.corrects_delta
    has_rows = needs.q or needs.query_scale or of_pairs or corrects_keys
    has_keys = needs.k or needs.v or needs.key_scale or of_pairs
    row_terms = _row_terms(ready, results, d_rows, needs, has_rows)
    found = new_gradients(ready, needs._replace(q=has_rows, k=has_keys, v=has_keys))
    if has_rows:
        _over_rows(ready, found, row_terms)
    if has_keys:
        _over_keys(ready, found, row_terms)
    found = summed(found, ready.call) if of_pairs else found
    return found._replace(
        q=found.q if needs.q else None,
        k=found.k if needs.k else None,
        v=found.v if needs.v else None,
        sinks=row_terms.d_sinks if needs.sinks else None,
    )


def _row_terms(ready: Prepared, results: Results, d_rows: RowGradients, needs: Needs, has_rows: bool) -> RowTerms:
    """Launch the pass whose terms the two others read. has_rows: that over rows runs, and corrects them."""
    problem = ready.specialisation.problem
    corrects = needs.query_scale or problem.has_bias or problem.relative_scale or problem.corrects_delta
    corrects = corrects and not problem.is_part
    d_sinks = corrected = None
    if ready.call.terms.sinks is not None and (needs.sinks or corrects):
        d_sinks = new_results(ready.call, results.lse)
    q, terms, visible = ready.call.q, ready.arguments["terms"], ready.call.visibility
    terms_len = -(-visible.q_len // ALIGNMENT) * ALIGNMENT
    if visible.sequences is not None:
        terms_len += ALIGNMENT * ready.sizes.sequences
    shape = (*q.shape[:2], terms_len)
    joined = torch.float32 if terms.query_scale is None else torch.int64
    both = q.new_empty((*shape, 2), dtype=joined)
    if corrects and has_rows:
        corrected = torch.empty_like(both)
    delta = q.new_empty(shape, dtype=torch.float32)
    of_exponents = None if d_rows.entropy is None else torch.empty_like(delta)
    found = RowTerms(d_rows.lse, d_sinks, both, corrected, delta, of_exponents)
    masks = ready.arguments["masks"]
    arguments = {
        "results": results,
        "d_lse_ptr": d_rows.lse,
        "d_entropy_ptr": d_rows.entropy,
        "query_scale": terms.query_scale,
        "q_starts": masks.q_starts,
        "k_starts": masks.k_starts,
        "row_terms_ptr": both,
        "delta_ptr": found.delta,
        "of_exponents_ptr": of_exponents,
        "d_sinks_ptr": d_sinks,
        "terms_len": terms_len,
    }
    launch_kernel("row_terms", ready, arguments, over_row_terms)
    return found


def _over_rows(ready: Prepared, found: Gradients, row_terms: RowTerms) -> None:
    """Launch the pass for the gradients of q and query_scale."""
    call, key_size = ready.call, None
    if call.terms.key_scale is not None and call.q.dtype == torch.float16:
        key_size = largest(seen_scales(call.terms.key_scale, call.visibility))
    arguments = {
        "row_terms": row_terms,
        "terms_len": row_terms.delta.shape[2],
        "gradients": of_rows(found),
        "key_size": key_size,
    }
    launch_kernel("grad_query", ready, arguments, over_rows)


def _over_keys(ready: Prepared, found: Gradients, row_terms: RowTerms) -> None:
    """Launch the pass for the gradients of k, v, key_scale, the three biases and the relative scale."""
    terms, masks, factor_size = ready.call.terms, ready.arguments["masks"], None
    if terms.query_scale is not None and ready.call.q.dtype == torch.float16:
        factor = terms.query_scale * (terms.scale * LOG2_E.value)
        factor_size = largest(factor.unflatten(1, (ready.sizes.kv_heads, -1)).flatten(2))
    arguments = {
        "terms": ready.arguments["terms"]._replace(query_scale=None),
        "row_terms_ptr": row_terms.terms if row_terms.corrected is None else row_terms.corrected,
        "of_exponents_ptr": row_terms.of_exponents,
        "terms_len": row_terms.delta.shape[2],
        "gradients": of_keys(found),
        "factor_size": factor_size,
    }
    of_plan = None if masks.key_ranges is None else row_bounds
    launch_kernel("grad_key_value", ready, arguments, over_keys, launch_in_row_splits, of_plan)


def new_gradients(ready: Prepared, needs: Needs) -> Gradients:
    """Memory for the gradients that are asked for, but those of sinks; of biases of pairs zeros, fp32 of full size."""
    call, terms, problem = ready.call, ready.call.terms, ready.specialisation.problem
    q, k, k_len, fp32 = call.q, call.k, call.visibility.k_len, torch.float32
    pairs = {}
    for name in PAIRS:
        x = getattr(terms, name)
        if x is not None and getattr(needs, name):
            pairs[name] = _of_pairs(call, k_len if AXES[name][-1] == "Sk" else x.shape[3])
    return Gradients(
        q=new_results(call, q, fp32 if problem.fp32_grad_q else q.dtype) if needs.q else None,
        k=new_results(call, k, fp32 if problem.fp32_grad_k else k.dtype) if needs.k else None,
        v=new_results(call, call.v, call.v.dtype) if needs.v else None,
        query_scale=new_results(call, q.select(3, 0)) if needs.query_scale else None,
        key_scale=new_results(call, k.select(3, 0)) if needs.key_scale else None,
        key_bias=new_results(call, terms.key_bias) if needs.key_bias and terms.key_bias is not None else None,
        **pairs,
    )


def _of_pairs(call: AttentionCall, width: int) -> Tensor:
    """Zeros [B, Hq, Sq, width] for the gradient of a bias of pairs: the kernel writes the visible ones."""
    padded = -(-width // 16) * 16  # rows begin where wide stores can
    return call.q.new_zeros((*call.q.shape[:3], padded), dtype=torch.float32)[..., :width]


def of_rows(found: Gradients) -> TensorGradients:
    """The record of a pass over rows."""
    return TensorGradients(q=found.q, query_scale=found.query_scale)


def of_keys(found: Gradients) -> TensorGradients:
    """The record of a pass over keys."""
    pairs = {}
    for name in PAIRS:
        x = getattr(found, name)
        if x is not None:
            pairs[name] = Strided(x, *x.stride())
    return TensorGradients(*found)._replace(q=None, query_scale=None, **pairs)


def summed(found: Gradients, call: AttentionCall) -> Gradients:
    """The gradients with those of pairs summed, in fp32 and one order, over the axes that a bias has once."""
    for name in PAIRS:
        x = getattr(found, name)
        if x is not None:
            bias = getattr(call.terms, name)
            found = found._replace(**{name: x.sum_to_size(bias.shape).to(bias.dtype)})
    return found


def row_bounds(chosen: Plan, arguments: Arguments, call: AttentionCall) -> Arguments:
    """The masks of a pass over keys with the rows of each block of keys, where key_ranges narrow them."""
    masks = arguments["masks"]
    view = View(*(arguments[name] for name in ("q_len", "k_len", "left", "right")), *masks[:2])
    bounds = rows_of_key_blocks(call.visibility, view, chosen.config.block_n)
    return {"masks": masks._replace(row_bounds=bounds)}


def launch_in_row_splits(chosen: Plan, grid: Grid, arguments: Arguments, ready: Prepared) -> None:
    """Launch a pass over keys whose rows are shared out among splits, and add their parts up."""
    call, specialisation = ready.call, ready.specialisation
    results, splits = arguments["gradients"], arguments["splits"]
    shared = {name: getattr(results, name) for name in ("k", "v", "key_scale", "key_bias")}
    parts = {name: new_parts(call, x, splits) for name, x in shared.items() if x is not None}
    if "key_bias" in parts:
        parts["key_bias"].zero_()  # a split writes the heads that it has rows of
    chosen.launch(grid, arguments | {"gradients": results._replace(**parts)}, specialisation.in_splits)
    for name, part in parts.items():
        add_splits(specialisation, part, shared[name])
