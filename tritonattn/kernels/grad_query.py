"""Backward, the pass over rows: gradients of q and query_scale."""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

from .addresses import begin_scale, contiguous_tile, in_vectors, load_factors, place_of_member, tile_at
from .primitives import (
    LENGTHS,
    LOG2_E,
    dropout_keeps,
    load_term,
    load_tile,
    partial_sums,
    program_in_section,
    scale_add_bias,
    scale_rows_add,
    soft_cap,
    soft_cap_slope,
    store_term,
    store_tile,
    terms_offset,
)
from .records import Dropout, Keys, Sight, View, Walk
from .walk import rows_of_block, visible_tile, walk_keys

# Few keys, over which a block of rows walks twice. Among more, some row's exact gradient is far larger than an error.
FEW_KEYS = tl.constexpr(64)


class QueryGradient(NamedTuple):
    """Sums over keys: raw = sum_j dX[i, j] * key_scale[j] * k[j] [M, D], and `partial_sums` that `_gather` adds up."""

    raw: Any
    d_logit: Any
    d_factor: Any
    mean_logit: Any


class RowGradients(NamedTuple):
    """Rows' terms of a step: the output's gradient [M, Dv], vectors [M], softcap and key_size or None, `Dropout`."""

    d_out: Any
    factor: Any
    exponent_term: Any
    delta: Any
    softcap: Any
    key_size: Any
    dropout: Dropout


@triton.jit
def _gather(
    state,
    block,
    key_scale,
    key_bias,
    terms,
    sight,
    SUMS: tl.constexpr,
    MASKED: tl.constexpr,
):
    """A step of `walk_keys`. SUMS: 1 also adds up dS, 2 besides dX * x and P * dz/dx * x, x without the row's factor
    and without bias.

    All in fp32; these products are fma's with 0, which nothing fuses further.
    """
    logits, softcap, dropout = block.logits, terms.softcap, terms.dropout
    d_logit_sum, d_factor, mean_logit = state.d_logit, state.d_factor, state.mean_logit
    COLUMNS: tl.constexpr = d_factor.shape[1]
    x, factor = logits, terms.factor
    if key_bias is not None:
        x = scale_add_bias(logits, factor[:, None], key_bias[None, :])
        factor = tl.full(factor.shape, 1.0, tl.float32)
    if softcap is None:
        exponent = scale_rows_add(x, factor, terms.exponent_term)
    else:
        capped = soft_cap(x * factor[:, None], softcap)
        exponent = capped + terms.exponent_term[:, None]
        if key_bias is not None:
            exponent = tl.where((key_bias == float("-inf"))[None, :], float("-inf"), exponent)
    probabilities = tl.exp2(exponent)
    d_probabilities = tl.dot(terms.d_out, block.v.T, input_precision="ieee")
    if MASKED:
        probabilities = tl.where(visible_tile(sight, block.offs), probabilities, 0.0)
    if dropout.state is not None:
        kept = dropout_keeps(dropout, dropout.rows[:, None], (dropout.first_key + block.offs)[None, :])
        d_probabilities = tl.where(kept, d_probabilities * dropout.keep_scale, 0.0)
    zero = tl.zeros_like(logits)
    d_logits = tl.fma(probabilities, d_probabilities - terms.delta[:, None], zero)
    if SUMS >= 1:
        d_logit_sum += partial_sums(d_logits, COLUMNS)
    if softcap is not None:
        slope = soft_cap_slope(capped, softcap)
        d_logits *= slope
        probabilities *= slope
    if SUMS == 2:
        d_factor += partial_sums(tl.fma(d_logits, logits, zero), COLUMNS)
        mean_logit += partial_sums(tl.fma(probabilities, logits, zero), COLUMNS)
    if key_scale is not None:
        if terms.key_size is not None:
            key_scale *= 1.0 / terms.key_size
        d_logits *= key_scale[None, :]
    raw = tl.dot(d_logits.to(block.k.dtype), block.k, state.raw, input_precision="ieee")
    return QueryGradient(raw, d_logit_sum, d_factor, mean_logit)


@triton.jit
def _excess(d_logit_sum, d_lse_ptr, d_sinks_ptr, row_offsets, live):
    """sum_j dS[i, j] - (d_lse[i] - d_sinks[i]): minus the error of delta[i]."""
    excess = tl.sum(d_logit_sum, 1)
    if d_lse_ptr is not None:
        excess -= tl.load(d_lse_ptr + row_offsets, mask=live, other=0.0)
    if d_sinks_ptr is not None:
        excess += tl.load(d_sinks_ptr + row_offsets, mask=live, other=0.0)
    return excess


@triton.jit
def _begin_few_keys(state, exponent_term, rows, walk, k_len, INVARIANT: tl.constexpr):
    """(state, exponent_term, walk) for a second walk of a block of rows that see few keys, its raw sum begun anew.

    Where INVARIANT each row decides for itself: the others keep their sum, and take part with probabilities of 0.
    """
    if INVARIANT:
        are_few = rows.hi - rows.lo <= FEW_KEYS
        raw = tl.where(are_few[:, None], 0.0, state.raw)
        exponent_term = tl.where(are_few, exponent_term, float("-inf"))
        sees = are_few & (rows.lo < rows.hi)
        touch_lo = tl.min(tl.where(sees, rows.lo, k_len), 0)
        touch_hi = tl.max(tl.where(sees, rows.hi, 0), 0)
    else:
        are_few = walk.touch_hi - walk.touch_lo <= FEW_KEYS
        raw = tl.where(are_few, 0.0, state.raw)
        touch_lo, touch_hi = walk.touch_lo, tl.where(are_few, walk.touch_hi, 0)
    state = QueryGradient(raw, state.d_logit, state.d_factor, state.mean_logit)
    return state, exponent_term, Walk(touch_lo, touch_hi, walk.full_start, walk.full_start)


@triton.jit(do_not_specialize=[*LENGTHS, "group"])
def attention_grad_query(
    k_descriptor,  # first: see `attention_forward`
    v_descriptor,
    q,
    k,
    v,
    d_out,
    query_scale,
    key_scale,
    key_bias,
    key_size,
    d_lse_ptr,
    d_sinks_ptr,
    terms,
    ranges,
    starts,
    mask,
    seen_ptr,
    d_q_ptr,
    d_query_scale_ptr,
    logit_terms,
    keep_from,
    dropout,
    left,
    right,
    q_len,
    k_len,
    terms_len,
    q_heads,
    group,
    first_y,
    first_z,
    HEAD_DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    SUM_COLUMNS: tl.constexpr,
    CORRECT_DELTA: tl.constexpr,
    IS_PART: tl.constexpr,
    WIDE: tl.constexpr,
    ALIGNED: tl.constexpr,
    INVARIANT: tl.constexpr,
    LANES: tl.constexpr,
):
    """Gradients of q and query_scale for BLOCK_M rows of one (batch or sequence, head), as `attention_forward`.

        P[i, j]          = exp(z[i, j]) / total[i]
        dS[i, j]         = P[i, j] * (keep[i, j] * keep_scale * (d_out[i] . v[j]) - delta[i])
        dX[i, j]         = dS[i, j] * dz/dx,  dz/dx = 1 - (z[i, j] / softcap)^2
        raw[i]           = sum_j dX[i, j] * key_scale[j] * k[j]
        d_q[i]           = scale * query_scale[i] * raw[i]
        d_query_scale[i] = scale * sum_j dX[i, j] * (q[i] . k[j]) * key_scale[j]

    terms, d_lse and d_sinks: see `attention_row_terms`. d_q [B, Hq, Sq, D] in q's dtype and d_query_scale fp32
    [B, Hq, Sq], contiguous, every row written once; d_query_scale may be None.

    key_size     fp32 [B, Hkv] or None: the largest |key_scale|, never 0. dX * key_scale / key_size is rounded to 16
                 bits, so that no size of the key scales pushes it out of fp16's range

    d_query_scale equals scale * (q[i] . raw[i]). That form would sum dX after rounding to 16 bits, and with it delta's
    error times the mean logit, which exceeds the result for sharp softmaxes; so dX stays in fp32. Over a row, dS must
    sum to d_lse - d_sinks: the excess of its sum is delta's error. The kernel takes that error's share out of the
    gradient, and corrects delta for the pass over the keys. With key_bias, whose gradients cancel likewise when they
    are summed, it does so without d_query_scale too. So does CORRECT_DELTA, which also
    computes d_q of few keys with the corrected delta: for a single key, dP - delta is nothing but their errors.
    IS_PART: rows see other keys too, so that nothing is known about these sums, and delta stays as it is.
    """
    block, head, member = program_in_section(q_heads, first_y, first_z, right is not None, LANES)
    q, k, v, d_out = in_vectors(q, ALIGNED), in_vectors(k, ALIGNED), in_vectors(v, ALIGNED), in_vectors(d_out, ALIGNED)
    packed_len = q_len
    place, q_len, k_len = place_of_member(member, head, head // group, q_heads, group, q_len, k_len, starts)
    first_row = block * BLOCK_M
    if starts is not None:
        if first_row >= q_len:
            return
    batch, kv_head = place.batch, place.kv_head
    view = View(q_len, k_len, left, right, ranges.key_lengths, ranges.key_ranges)
    rows = rows_of_block(first_row, batch, view, BLOCK_M)
    memory_row = (place.first_row + first_row).to(tl.int64)
    row_base = (batch.to(tl.int64) * q_heads + head.to(tl.int64)) * packed_len + memory_row
    row_offsets = row_base + tl.arange(0, BLOCK_M)

    term_offsets = terms_offset(place, terms_len, starts) + first_row + tl.arange(0, BLOCK_M)
    factor = tl.full([BLOCK_M], 1.0, tl.float32) * (logit_terms.scale * LOG2_E)
    exponent_term, factor = load_term(terms.both + 2 * term_offsets, factor, SPLIT=False)
    delta = tl.load(terms.delta + term_offsets)
    live = exponent_term != float("-inf")
    q_tile = load_tile(tile_at(q, batch, head, memory_row, BLOCK_M, BLOCK_D, WIDE), live, HEAD_DIM, True)
    d_out_tile = load_tile(tile_at(d_out, batch, head, memory_row, BLOCK_M, BLOCK_DV, WIDE), live, VALUE_DIM, True)
    if key_size is not None:
        key_size = tl.load(key_size + batch * (q_heads // group) + kv_head)
    batch_head, packed_rows = batch * q_heads + head, place.first_row + rows.offs
    dropped = Dropout(dropout.state, keep_from, dropout.keep_scale, batch_head, packed_rows, place.first_key)
    d_rows = RowGradients(d_out_tile, factor, exponent_term, delta, logit_terms.softcap, key_size, dropped)

    zeros = tl.zeros([BLOCK_M, SUM_COLUMNS], tl.float32)
    state = QueryGradient(tl.zeros([BLOCK_M, BLOCK_D], tl.float32), zeros, zeros, zeros)
    keys = Keys(k, v, k_descriptor, v_descriptor, key_scale, key_bias, seen_ptr, None)
    sight = Sight(place, rows, view, mask)
    SUMS: tl.constexpr = 2 if d_query_scale_ptr is not None else 1 if CORRECT_DELTA or key_bias is not None else 0
    state, walk = walk_keys(
        state, _gather, d_rows, q_tile, keys, sight, HEAD_DIM, VALUE_DIM, BLOCK_DV, BLOCK_N, WIDE, SUMS, INVARIANT
    )
    if SUMS and not IS_PART:
        excess = _excess(state.d_logit, d_lse_ptr, d_sinks_ptr, row_offsets, live)
        delta += excess
    if CORRECT_DELTA:
        state, exponent_term, few = _begin_few_keys(state, exponent_term, rows, walk, k_len, INVARIANT)
        d_rows = RowGradients(d_out_tile, factor, exponent_term, delta, logit_terms.softcap, key_size, dropped)
        state, _ = walk_keys(
            state, _gather, d_rows, q_tile, keys, sight, HEAD_DIM, VALUE_DIM, BLOCK_DV, BLOCK_N, WIDE, 0, INVARIANT, few
        )

    d_q = state.raw * logit_terms.scale
    if key_size is not None:
        d_q *= key_size
    if query_scale is not None:
        d_q *= load_factors(begin_scale(query_scale, batch, head, memory_row), live)[:, None]
    if SUMS == 2:
        d_query_scale = tl.sum(state.d_factor, 1)
        if not IS_PART:
            d_query_scale = tl.fma(-excess, tl.sum(state.mean_logit, 1), d_query_scale)
        tl.store(d_query_scale_ptr + row_offsets, d_query_scale * logit_terms.scale, mask=rows.keep)
    if SUMS:
        gradient_term = -delta
        if query_scale is not None and key_bias is None:
            gradient_term *= factor
        store_term(terms.both + 2 * term_offsets + 1, gradient_term, factor, rows.keep)
    store_tile(contiguous_tile(d_q_ptr, row_base, BLOCK_M, BLOCK_D, HEAD_DIM), d_q, rows.keep, HEAD_DIM)
