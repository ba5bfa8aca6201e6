"""The rows that see a block of keys, and the walk over them, which adds up the gradients of the keys."""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

from .addresses import begin_seen
from .primitives import (
    dropout_keeps,
    load_term,
    partial_sums,
    scale_add_bias,
    scale_columns_add,
    soft_cap,
    soft_cap_slope,
    tile_offsets,
)
from .records import Dropout, Place, Strided
from .walk import block_at, load_mask, load_rows, part_of_walk, range_pointers, walk_between, walk_span


class KeyTiles(NamedTuple):
    """A block of keys [N, D], values [N, Dv], their scale [N] or None; rows first_row[j] .. last_row[j] see key j."""

    k: Any
    v: Any
    scale: Any
    offs: Any
    first_row: Any
    last_row: Any


class KeyGradients(NamedTuple):
    """Sums over rows: k [N, D] without key_scale and constants, v [N, Dv], bias the `partial_sums` of dX."""

    k: Any
    v: Any
    bias: Any


class Queries(NamedTuple):
    """The rows of one (member, head), from its first on, with descriptors of the whole of q and d_out, or None.

    mask        `Strided` uint8 [Sq, Sk] of the head, or None
    terms       pointers to the rows' terms: `primitives.load_term`
    constant    the factor of rows whose terms have none; size: what it is divided by, the other way up, or None
    """

    place: Place
    mask: Strided
    q: Strided
    d_out: Strided
    q_descriptor: Any
    d_out_descriptor: Any
    terms: Any
    constant: Any
    size: Any
    softcap: Any
    dropout: Dropout


@triton.jit
def rows_that_see(offs_n, keep, seen_ptr, place, view):
    """(first_row, last_row, is_seen) of keys: the rows that see each, key_ranges apart, and keep without unseen keys.

    seen_ptr   uint8 [B, Hkv, Sk], contiguous, or None: keys that some row sees
    """
    own_row = offs_n - (view.k_len - view.q_len)
    first_row = tl.zeros(offs_n.shape, tl.int32)
    last_row = first_row
    if view.right is not None:
        first_row = own_row - view.right
    if view.left is not None:
        last_row = own_row + view.left
        keep = keep & (last_row >= 0)
    if view.key_lengths is not None:
        unpadded = offs_n < tl.load(view.key_lengths + place.batch)
        first_row = tl.where(unpadded, first_row, view.q_len)
        keep = keep & unpadded
    if seen_ptr is not None:
        keep = keep & (tl.load(begin_seen(seen_ptr, place, view.k_len) + offs_n, mask=keep, other=0) != 0)
    return first_row, last_row, keep


@triton.jit
def walk_over_rows(first, last, batch, view, bounds_ptr, BLOCK_M: tl.constexpr, MASKED: tl.constexpr):
    """The `Walk` of the keys first .. last, both below k_len, over the rows that see them.

    bounds_ptr   int32 [2] of this block, or None: the first row and one past the last row whose key_ranges touch it
    MASKED       all blocks of rows need a mask, as they do with key_ranges
    """
    shift = view.k_len - view.q_len
    touch_lo = first * 0
    touch_hi = touch_lo + view.q_len
    full_lo, full_hi = touch_lo, touch_hi
    if view.right is not None:
        touch_lo = tl.maximum(first - shift - view.right, 0)
        full_lo = tl.maximum(last - shift - view.right, 0)
    if view.left is not None:
        touch_hi = tl.maximum(tl.minimum(last - shift + view.left + 1, view.q_len), 0)
        full_hi = tl.maximum(tl.minimum(first - shift + view.left + 1, view.q_len), 0)
    if view.key_lengths is not None:
        length = tl.load(view.key_lengths + batch)
        touch_hi = tl.where(first < length, touch_hi, 0)
        full_hi = tl.where(last < length, full_hi, 0)
    if bounds_ptr is not None:
        touch_lo = tl.maximum(touch_lo, tl.load(bounds_ptr))
        touch_hi = tl.minimum(touch_hi, tl.load(bounds_ptr + 1))
    return walk_between(touch_lo, touch_hi, full_lo, full_hi, BLOCK_M, MASKED or bounds_ptr is not None)


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
def _walk_blocks(
    sums,
    keys,
    bias,
    queries,
    view,
    walk,
    HEAD_DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    BLOCK_M: tl.constexpr,
    SUM_BIAS: tl.constexpr,
    SPLIT_TERMS: tl.constexpr,
    WIDE: tl.constexpr,
    MASKED: tl.constexpr,
    INVARIANT: tl.constexpr,
):
    """The sums with the full blocks of a walk added, or, where MASKED, the others: see `walk_rows`."""
    d_k, d_v, d_bias = sums.k, sums.v, sums.bias
    softcap, dropout, place = queries.softcap, queries.dropout, queries.place
    # Masks hold registers: masked steps take half of a wide block.
    M: tl.constexpr = BLOCK_M // 2 if MASKED and BLOCK_M >= 64 and not INVARIANT else BLOCK_M
    start, end = walk_span(walk, M, MASKED)
    q_offsets = tile_offsets(M, keys.k.shape[1], queries.q.s, queries.q.d, WIDE)
    d_out_offsets = tile_offsets(M, keys.v.shape[1], queries.d_out.s, queries.d_out.d, WIDE)
    batch, head, first_row = place.batch, place.head, place.first_row
    one = tl.full([M], 1.0, tl.float32)
    # Carried along: addresses made from the position would make the loop's counter one of 64 bits.
    term_ptrs = queries.terms + 2 * (start + tl.arange(0, M))
    for position in tl.range(start, end, M):
        first, offs_m = block_at(position, walk, M, MASKED)
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
        logits = tl.dot(keys.k, q.T, input_precision="ieee")  # [BLOCK_N, M]
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
            probabilities = tl.where(_visible_tile(keys, offs_m, live, batch, view, queries.mask), probabilities, 0.0)
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
        term_ptrs += 2 * M
    return KeyGradients(d_k, d_v, d_bias)


@triton.jit
def walk_rows(
    sums,
    keys,
    bias,
    queries,
    view,
    walk,
    HEAD_DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    BLOCK_M: tl.constexpr,
    SUM_BIAS: tl.constexpr,
    SPLIT_TERMS: tl.constexpr,
    WIDE: tl.constexpr,
    INVARIANT: tl.constexpr,
):
    """The sums with the rows of one query head added, in the order of `walk.walk_keys`. Tiles are [keys, rows].

    sums   `KeyGradients`; its bias only grows where SUM_BIAS
    bias   of the keys [N], in base 2, or None
    """
    FIRST: tl.constexpr = 1 if INVARIANT and view.right is None else 0
    for turn in tl.static_range(FIRST, 3 if INVARIANT else 2):
        if turn != 1 or (queries.mask is None and view.key_ranges is None):
            part = part_of_walk(walk, turn) if INVARIANT else walk
            sums = _walk_blocks(
                sums,
                keys,
                bias,
                queries,
                view,
                part,
                HEAD_DIM,
                VALUE_DIM,
                BLOCK_M,
                SUM_BIAS,
                SPLIT_TERMS,
                WIDE,
                turn != 1,
                INVARIANT,
            )
    return sums
