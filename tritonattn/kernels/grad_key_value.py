"""Backward, the pass over keys: gradients of k, v and vectors of keys, block by block, without atomics."""

from __future__ import annotations

import triton
import triton.language as tl

from .addresses import (
    begin,
    begin_bias,
    begin_scale,
    contiguous_tile,
    in_vectors,
    load_factors,
    place_of_member,
    tile_at,
)
from .primitives import LENGTHS, LN_2, LOG2_E, load_tile, program_in_section, store_tile, terms_offset
from .records import Dropout, Place, View
from .walk_rows import KeyGradients, KeyTiles, Queries, rows_that_see, walk_over_rows, walk_rows


@triton.jit
def _constant_of(terms, scale, size):
    """The constant by which the sum of dX * factor * q is multiplied: `Queries` says which factor rows have."""
    if terms.both.dtype.element_ty == tl.float32:
        constant = scale
    elif size is None:
        constant = LN_2
    else:
        constant = LN_2 / size
    return constant


@triton.jit
def _products_with_keys(k_ptrs, keep, x, HEAD_DIM: tl.constexpr):
    """k[j] . x[j] of a block of keys, which are loaded again.

    An eviction policy of its own keeps the compiler from taking both loads for one: keys that outlive the walk would be
    held in registers all through it, and in fp32 spill.
    """
    k_tile = load_tile(k_ptrs, keep, HEAD_DIM, True, LAST=True)
    return tl.sum(k_tile.to(tl.float32) * x, 1)


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
    WIDE: tl.constexpr,
    ALIGNED: tl.constexpr,
    INVARIANT: tl.constexpr,
    LANES: tl.constexpr,
):
    """Gradients of k, v, key_scale and key_bias for BLOCK_N keys of one (batch or sequence, kv head); names as in
    `attention_grad_query`.

        d_v[j]         = sum_i keep[i, j] * keep_scale * P[i, j] * d_out[i]
        raw[j]         = scale * sum_i dX[i, j] * query_scale[i] * q[i]      over the rows of all heads of the group
        d_k[j]         = key_scale[j] * raw[j]
        d_key_scale[j] = k[j] . raw[j]                                       never divided by key_scale, which may be 0
        d_key_bias[j]  = sum_i dX[i, j]                                      over the rows of one head of the group

    Grid: (heads of a section, blocks of the longest Sk, sections), see `program_in_section`. Sums run in one fixed
    order inside a program: bitwise repeatable.

    *_descriptor     tensor descriptors of q and d_out with blocks [1, 1, BLOCK_M, BLOCK_D or BLOCK_DV], or None
    terms            of `attention_row_terms`: with query_scale, dS * factor is one fma, and log2(e) is taken out once
                     at the end. With key_bias the factor comes later: dX itself is added up first
    factor_size      fp32 [B, Hkv] or None: the largest |factor| of the group, never 0. dS * factor / factor_size is
                     rounded to 16 bits, so that a small factor does not push it below fp16's range
    row_bounds       int32 [B, cdiv(Sk, BLOCK_N), 2] with key_ranges: `walk_rows.walk_over_rows`
    d_k, d_v         [B, Hkv, Sk, D] and [B, Hkv, Sk, Dv] contiguous; d_key_scale fp32 [B, Hkv, Sk] and d_key_bias
                     fp32 [B, Hkv, group, Sk] contiguous or None
    """
    kv_heads = q_heads // group
    block, kv_head, member = program_in_section(kv_heads, first_y, first_z, False, LANES)
    q, k, v, d_out = in_vectors(q, ALIGNED), in_vectors(k, ALIGNED), in_vectors(v, ALIGNED), in_vectors(d_out, ALIGNED)
    packed_len = k_len
    place, q_len, k_len = place_of_member(member, kv_head * group, kv_head, q_heads, group, q_len, k_len, starts)
    first_key = block * BLOCK_N
    if starts is not None:
        if first_key >= k_len:
            return
    batch = place.batch
    view = View(q_len, k_len, left, right, ranges.key_lengths, ranges.key_ranges)
    last_key = tl.minimum(first_key + BLOCK_N, k_len) - 1
    offs_n = first_key + tl.arange(0, BLOCK_N)
    keep_key = offs_n < k_len
    first_row, last_row, load_key = rows_that_see(offs_n, keep_key, seen_ptr, place, view)
    if row_bounds_ptr is not None:
        row_bounds_ptr += (batch.to(tl.int64) * tl.cdiv(k_len, BLOCK_N) + block) * 2
    walk = walk_over_rows(first_key, last_key, batch, view, row_bounds_ptr, BLOCK_M, mask is not None)

    memory_key = (place.first_key + first_key).to(tl.int64)
    k_ptrs = tile_at(k, batch, kv_head, memory_key, BLOCK_N, BLOCK_D, WIDE)
    k_tile = load_tile(k_ptrs, load_key, HEAD_DIM, True)
    v_tile = load_tile(tile_at(v, batch, kv_head, memory_key, BLOCK_N, BLOCK_DV, WIDE), load_key, VALUE_DIM, True)
    if key_scale is not None:
        key_scale = load_factors(begin_scale(key_scale, batch, kv_head, memory_key), load_key)
    if factor_size is not None:
        factor_size = 1.0 / tl.load(factor_size + batch * kv_heads + kv_head)
    keys = KeyTiles(k_tile, v_tile, key_scale, offs_n, first_row, last_row)

    SUM_BIAS: tl.constexpr = d_key_bias_ptr is not None
    d_k = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    d_v = tl.zeros([BLOCK_N, BLOCK_DV], tl.float32)
    for index in range(0, group):
        head = kv_head * group + index
        batch_head = batch * q_heads + head
        place_of_head = Place(batch, head, kv_head, q_heads, group, member, place.first_row, place.first_key)
        queries = Queries(
            place_of_head,
            None if mask is None else begin(mask, batch, head, 0),
            begin(q, batch, head, place.first_row),
            begin(d_out, batch, head, place.first_row),
            q_descriptor,
            d_out_descriptor,
            terms.both + 2 * terms_offset(place_of_head, terms_len, starts),
            logit_terms.scale * LOG2_E,
            factor_size,
            logit_terms.softcap,
            Dropout(dropout.state, keep_from, dropout.keep_scale, batch_head, place.first_row, place.first_key),
        )
        bias = None
        if key_bias is not None:
            bias = load_factors(begin_bias(key_bias, batch, kv_head, index, memory_key), load_key) * LOG2_E
        sums = KeyGradients(d_k, d_v, tl.zeros([BLOCK_N, KEY_SUM_COLUMNS], tl.float32))
        sums = walk_rows(
            sums, keys, bias, queries, view, walk, HEAD_DIM, VALUE_DIM, BLOCK_M, SUM_BIAS, SPLIT_TERMS, WIDE, INVARIANT
        )
        d_k, d_v = sums.k, sums.v
        if SUM_BIAS:
            head_base = batch_head.to(tl.int64) * packed_len + memory_key
            tl.store(d_key_bias_ptr + head_base + tl.arange(0, BLOCK_N), tl.sum(sums.bias, 1), mask=keep_key)

    d_k *= _constant_of(terms, logit_terms.scale, factor_size)
    if dropout.state is not None:
        d_v *= dropout.keep_scale
    key_base = (batch.to(tl.int64) * kv_heads + kv_head) * packed_len + memory_key
    if key_scale is not None:
        if d_key_scale_ptr is not None:
            d_key_scale = _products_with_keys(k_ptrs, load_key, d_k, HEAD_DIM)
            tl.store(d_key_scale_ptr + key_base + tl.arange(0, BLOCK_N), d_key_scale, mask=keep_key)
        d_k *= key_scale[:, None]
    store_tile(contiguous_tile(d_k_ptr, key_base, BLOCK_N, BLOCK_D, HEAD_DIM), d_k, keep_key, HEAD_DIM)
    store_tile(contiguous_tile(d_v_ptr, key_base, BLOCK_N, BLOCK_DV, VALUE_DIM), d_v, keep_key, VALUE_DIM)
