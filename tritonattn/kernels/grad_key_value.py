"""Backward, the pass over keys: gradients of k, v and vectors of keys, block by block, without atomics."""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

from .primitives import (
    LENGTHS,
    LN_2,
    LOG2_E,
    dropout_keeps,
    load_term,
    load_tile,
    partial_sums,
    program_position,
    scale_add_bias,
    scale_columns_add,
    soft_cap,
    soft_cap_slope,
    store_tile,
    terms_offset,
    tile_offsets,
)
from .records import Dropout, Place, Strided, View
from .walk import (
    begin,
    begin_bias,
    begin_scale,
    block_at,
    in_vectors,
    load_mask,
    load_rows,
    part_of_walk,
    place_of_member,
    range_pointers,
    walk_over_rows,
    walk_span,
)


class KeyTiles(NamedTuple):
    """A block of keys [N, D], values [N, Dv], their scale [N] or None; rows first_row[j] .. last_row[j] see key j."""

    k: Any
    v: Any
    scale: Any
    offs: Any
    first_row: Any
    last_row: Any


class Queries(NamedTuple):
    """The rows of one (member, head), from its first on, with descriptors of the whole of q and d_out, or None.

    terms       pointers to the rows' terms: `primitives.load_term`
    constant    the factor of rows whose terms have none; size: what it is divided by, the other way up, or None
    """

    q: Strided
    d_out: Strided
    q_descriptor: Any
    d_out_descriptor: Any
    terms: Any
    constant: Any
    size: Any


@triton.jit
def _visible_tile(keys, offs_m, keep_row, batch, view, mask):
    """Mask tile [keys, rows]: first_row <= i <= last_row, the ranges of the rows, and the dense mask."""
    keep = offs_m[None, :] >= keys.first_row[:, None]
    if view.left is not None:
        keep = keep & (offs_m[None, :] <= keys.last_row[:, None])
    if view.key_ranges is not None:
        pointers = range_pointers(view, batch, offs_m)
        lo = tl.load(pointers, mask=keep_row, other=0)
        hi = tl.load(pointers + 1, mask=keep_row, other=0)
        keep = keep & (keys.offs[:, None] >= lo[None, :]) & (keys.offs[:, None] < hi[None, :])
    if mask is not None:
        keep = keep & load_mask(mask, keys.offs, offs_m, view.k_len, view.q_len, mask.d, mask.s)
    return keep


@triton.jit
def _walk_rows(
    d_k,
    d_v,
    d_bias,
    keys,
    bias,
    queries,
    softcap,
    view,
    mask,
    walk,
    place,
    dropout,
    HEAD_DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    BLOCK_M: tl.constexpr,
    SUM_BIAS: tl.constexpr,
    SPLIT_TERMS: tl.constexpr,
    WIDE: tl.constexpr,
    MASKED: tl.constexpr,
):
    """Add to d_k (without key_scale and constants) and d_v the full blocks of rows, or, where MASKED, the others.

    Tiles are [keys, rows]. bias is that of the keys [N], in base 2, or None; SUM_BIAS: add to d_bias, `partial_sums`,
    the gradient of the logits.
    """
    start, end = walk_span(walk, BLOCK_M, MASKED)
    q_offsets = tile_offsets(BLOCK_M, keys.k.shape[1], queries.q.s, queries.q.d, WIDE)
    d_out_offsets = tile_offsets(BLOCK_M, keys.v.shape[1], queries.d_out.s, queries.d_out.d, WIDE)
    batch, head, first_row = place.batch, place.head, place.first_row
    one = tl.full([BLOCK_M], 1.0, tl.float32)
    # Carried along: addresses made from the position would make the loop's counter one of 64 bits.
    term_ptrs = queries.terms + 2 * (start + tl.arange(0, BLOCK_M))
    for position in tl.range(start, end, BLOCK_M):
        first, offs_m = block_at(position, walk, BLOCK_M, MASKED)
        if MASKED:
            term_ptrs = queries.terms + 2 * offs_m
        exponent_term, factor = load_term(term_ptrs, queries.constant, SPLIT_TERMS)
        live = exponent_term != float("-inf")
        q = load_rows(queries.q, queries.q_descriptor, q_offsets, batch, head, first_row, first, live, HEAD_DIM, MASKED)
        d_out = load_rows(
            queries.d_out,
            queries.d_out_descriptor,
            d_out_offsets,
            batch,
            head,
            first_row,
            first,
            live,
            VALUE_DIM,
            MASKED,
        )
        logits = tl.dot(keys.k, q.T, input_precision="ieee")  # [BLOCK_N, BLOCK_M]
        if keys.scale is not None:
            logits *= keys.scale[:, None]
        x, x_factor = logits, factor
        if bias is not None:
            row_factor = factor
            if factor.type.is_block():
                row_factor = factor[None, :]
            x, x_factor = scale_add_bias(logits, row_factor, bias[:, None]), one
        if softcap is None:
            exponent = scale_columns_add(x, x_factor, exponent_term)
        else:
            capped = soft_cap(scale_columns_add(x, x_factor, tl.zeros_like(exponent_term)), softcap)
            exponent = capped + exponent_term[None, :]
            if bias is not None:
                exponent = tl.where((bias == float("-inf"))[:, None], float("-inf"), exponent)
        probabilities = tl.exp2(exponent)
        if MASKED:
            probabilities = tl.where(_visible_tile(keys, offs_m, live, batch, view, mask), probabilities, 0.0)
        d_probabilities = tl.dot(keys.v, d_out.T, input_precision="ieee")
        weights = probabilities
        if dropout.state is not None:
            kept = dropout_keeps(dropout, (first_row + offs_m)[None, :], (dropout.first_key + keys.offs)[:, None])
            weights = tl.where(kept, probabilities, 0.0)
            d_probabilities = tl.where(kept, d_probabilities * dropout.keep_scale, 0.0)
        gradient_term, gradient_factor = load_term(term_ptrs + 1, one, SPLIT_TERMS)
        d_v = tl.dot(weights.to(d_out.dtype), d_out, d_v, input_precision="ieee")
        if queries.size is not None:
            gradient_factor *= queries.size
            if bias is None:
                gradient_term *= queries.size
        late_factor = gradient_factor
        if bias is not None:  # the gradient of a logit is added up before it meets the factor
            gradient_factor = one
        d_logits = probabilities * scale_columns_add(d_probabilities, gradient_factor, gradient_term)
        if softcap is not None:
            d_logits *= soft_cap_slope(capped, softcap)
        if SUM_BIAS:
            d_bias += partial_sums(d_logits, d_bias.shape[1])
        if bias is not None:
            d_logits *= late_factor[None, :]
        d_k = tl.dot(d_logits.to(q.dtype), q, d_k, input_precision="ieee")
        term_ptrs += 2 * BLOCK_M
    return d_k, d_v, d_bias


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
    terms,
    factor_size,
    ranges,
    starts,
    row_bounds_ptr,
    mask,
    seen_ptr,
    d_k_ptr,
    d_v_ptr,
    d_key_scale_ptr,
    d_key_bias_ptr,
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
    first_head,
    first_member,
    HEAD_DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    KEY_SUM_COLUMNS: tl.constexpr,
    SPLIT_TERMS: tl.constexpr,
    WIDE: tl.constexpr,
    ALIGNED: tl.constexpr,
    INVARIANT: tl.constexpr,
):
    """Gradients of k, v, key_scale and key_bias for BLOCK_N keys of one (batch or sequence, kv head); names as in
    `attention_grad_query`.

        d_v[j]         = sum_i keep[i, j] * keep_scale * P[i, j] * d_out[i]
        raw[j]         = scale * sum_i dX[i, j] * query_scale[i] * q[i]      over the rows of all heads of the group
        d_k[j]         = key_scale[j] * raw[j]
        d_key_scale[j] = k[j] . raw[j]                                       never divided by key_scale, which may be 0
        d_key_bias[j]  = sum_i dX[i, j]                                      over the rows of one head of the group

    Grid: (blocks of the longest Sk, Hkv, members). Sums run in one fixed order inside a program: bitwise repeatable.

    *_descriptor     tensor descriptors of q and d_out with blocks [1, 1, BLOCK_M, BLOCK_D or BLOCK_DV], or None
    terms            of `attention_row_terms`: with query_scale, dS * factor is one fma, and log2(e) is taken out once
                     at the end. With key_bias the factor comes later: dX itself is added up first
    factor_size      fp32 [B, Hkv] or None: the largest |factor| of the group, never 0. dS * factor / factor_size is
                     rounded to 16 bits, so that a small factor does not push it below fp16's range
    row_bounds       int32 [B, cdiv(Sk, BLOCK_N), 2] with key_ranges: `walk.walk_over_rows`
    d_k, d_v         [B, Hkv, Sk, D] and [B, Hkv, Sk, Dv] contiguous; d_key_scale fp32 [B, Hkv, Sk] and d_key_bias
                     fp32 [B, Hkv, group, Sk] contiguous or None
    """
    kv_heads = q_heads // group
    block, kv_head, member = program_position(first_head, first_member, LAST_FIRST=False)
    q, k, v, d_out = in_vectors(q, ALIGNED), in_vectors(k, ALIGNED), in_vectors(v, ALIGNED), in_vectors(d_out, ALIGNED)
    packed_len = k_len
    place, q_len, k_len = place_of_member(member, kv_head * group, kv_head, q_len, k_len, starts)
    first_key = block * BLOCK_N
    if starts is not None:
        if first_key >= k_len:
            return
    batch = place.batch
    view = View(q_len, k_len, left, right, ranges.key_lengths, ranges.key_ranges)
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
    if ranges.key_lengths is not None:
        unpadded = offs_n < tl.load(ranges.key_lengths + batch)
        first_row = tl.where(unpadded, first_row, q_len)
        load_key = load_key & unpadded
    if seen_ptr is not None:
        seen_ptr += (batch.to(tl.int64) * kv_heads + kv_head) * k_len
        load_key = load_key & (tl.load(seen_ptr + offs_n, mask=load_key, other=0) != 0)
    if row_bounds_ptr is not None:
        row_bounds_ptr += (batch.to(tl.int64) * tl.cdiv(k_len, BLOCK_N) + block) * 2
    MASKED: tl.constexpr = row_bounds_ptr is not None or mask is not None
    walk = walk_over_rows(first_key, last_key, batch, view, row_bounds_ptr, BLOCK_M, MASKED)

    memory_key = (place.first_key + first_key).to(tl.int64)
    k_ptrs = begin(k, batch, kv_head, memory_key).ptr + tile_offsets(BLOCK_N, BLOCK_D, k.s, k.d, WIDE)
    k_tile = load_tile(k_ptrs, load_key, HEAD_DIM, True)
    v_ptrs = begin(v, batch, kv_head, memory_key).ptr + tile_offsets(BLOCK_N, BLOCK_DV, v.s, v.d, WIDE)
    v_tile = load_tile(v_ptrs, load_key, VALUE_DIM, True)
    if key_scale is not None:
        key_scale = begin_scale(key_scale, batch, kv_head, memory_key)
        scale_ptrs = key_scale.ptr + tl.arange(0, BLOCK_N).to(tl.int64) * key_scale.s
        key_scale = tl.load(scale_ptrs, mask=load_key, other=0.0)
    if factor_size is not None:
        factor_size = 1.0 / tl.load(factor_size + batch * kv_heads + kv_head)
    keys = KeyTiles(k_tile, v_tile, key_scale, offs_n, first_row, last_row)

    # Masks hold registers: masked steps take half of a wide block.
    MASKED_STEP: tl.constexpr = BLOCK_M // 2 if BLOCK_M >= 64 and not INVARIANT else BLOCK_M
    FIRST: tl.constexpr = 1 if INVARIANT and right is None else 0
    d_k = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    d_v = tl.zeros([BLOCK_N, BLOCK_DV], tl.float32)
    for index in range(0, group):
        head = kv_head * group + index
        place_of_head = Place(batch, head, kv_head, place.first_row, place.first_key)
        head_mask, bias = None, None
        if mask is not None:
            head_mask = begin(mask, batch, head, 0)
        queries = Queries(
            begin(q, batch, head, place.first_row),
            begin(d_out, batch, head, place.first_row),
            q_descriptor,
            d_out_descriptor,
            terms.both + 2 * terms_offset(place_of_head, member, q_heads, terms_len, starts),
            logit_terms.scale * LOG2_E,
            factor_size,
        )
        batch_head = batch * q_heads + head
        dropped = Dropout(dropout.state, keep_from, dropout.keep_scale, batch_head, place.first_row, place.first_key)
        if key_bias is not None:
            head_bias = begin_bias(key_bias, batch, kv_head, index, memory_key)
            bias_ptrs = head_bias.ptr + tl.arange(0, BLOCK_N).to(tl.int64) * head_bias.s
            bias = tl.load(bias_ptrs, mask=load_key, other=0.0) * LOG2_E
        d_bias = tl.zeros([BLOCK_N, KEY_SUM_COLUMNS], tl.float32)
        # The blocks that need a mask, then the others; or, where INVARIANT, in the order of `part_of_walk`.
        for turn in tl.static_range(FIRST, 3 if INVARIANT else 2):
            if turn != 1 or (mask is None and ranges.key_ranges is None):
                part = walk
                if INVARIANT:
                    part = part_of_walk(walk, turn)
                d_k, d_v, d_bias = _walk_rows(
                    d_k,
                    d_v,
                    d_bias,
                    keys,
                    bias,
                    queries,
                    logit_terms.softcap,
                    view,
                    head_mask,
                    part,
                    place_of_head,
                    dropped,
                    HEAD_DIM,
                    VALUE_DIM,
                    BLOCK_M if turn == 1 else MASKED_STEP,
                    d_key_bias_ptr is not None,
                    SPLIT_TERMS,
                    WIDE,
                    turn != 1,
                )
        if d_key_bias_ptr is not None:
            head_base = batch_head.to(tl.int64) * packed_len + memory_key
            tl.store(d_key_bias_ptr + head_base + tl.arange(0, BLOCK_N), tl.sum(d_bias, 1), mask=keep_key)

    if terms.both.dtype.element_ty == tl.float32:
        d_k *= logit_terms.scale
    elif factor_size is None:
        d_k *= LN_2
    else:
        d_k *= LN_2 / factor_size
    if dropout.state is not None:
        d_v *= dropout.keep_scale
    key_base = (batch.to(tl.int64) * kv_heads + kv_head) * packed_len + memory_key
    if key_scale is not None:
        if d_key_scale_ptr is not None:
            # Loaded again, by a policy of its own so that the compiler does not take both loads for one: keys that
            # outlive the loop are held in registers all through it, and in fp32 spill.
            k_tile = load_tile(k_ptrs, load_key, HEAD_DIM, True, LAST=True)
            d_key_scale = tl.sum(k_tile.to(tl.float32) * d_k, 1)
            tl.store(d_key_scale_ptr + key_base + tl.arange(0, BLOCK_N), d_key_scale, mask=keep_key)
        d_k *= key_scale[:, None]
    d_k_ptrs = d_k_ptr + key_base * HEAD_DIM + tile_offsets(BLOCK_N, BLOCK_D, HEAD_DIM, 1, False)
    store_tile(d_k_ptrs, d_k, keep_key, HEAD_DIM)
    d_v_ptrs = d_v_ptr + key_base * VALUE_DIM + tile_offsets(BLOCK_N, BLOCK_DV, VALUE_DIM, 1, False)
    store_tile(d_v_ptrs, d_v, keep_key, VALUE_DIM)
