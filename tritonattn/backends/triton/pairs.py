"""Device functions of pairs of a row and a key: which are visible, the blocks that hold them, their terms, dropout."""

from __future__ import annotations

import triton
import triton.language as tl

from .block import from_row
from .softmax import LOG2_E

UNMASKED = tl.constexpr(1)  # of `pass_bounds`: the pass over blocks that need no mask


@triton.jit
def key_range(row, batch, view):
    """The visible keys lo <= j < hi of a row or a vector of rows below q_len; lo >= hi is a row without keys.

    left, right      j >= row + k_len - q_len - left, j <= row + k_len - q_len + right
    key_lengths      int32 [B]: j < key_lengths[batch]
    key_ranges       int32 [B, Sq, 2], contiguous: key_ranges[batch, row, 0] <= j < key_ranges[batch, row, 1]
    """
    position = row + (view.k_len - view.q_len)
    lo = row * 0
    hi = lo + view.k_len
    if view.left is not None:
        lo = tl.maximum(position - view.left, 0)
    if view.right is not None:
        hi = tl.minimum(position + (view.right + 1), hi)
    if view.key_lengths is not None:
        hi = tl.minimum(hi, tl.load(view.key_lengths + batch))
    if view.key_ranges is not None:
        bounds = view.key_ranges + (batch.to(tl.int64) * view.q_len + row) * 2
        lo = tl.maximum(lo, tl.load(bounds))
        hi = tl.minimum(hi, tl.load(bounds + 1))
    return lo, hi


@triton.jit
def whole_blocks(start, full_lo, full_hi, BLOCK: tl.constexpr, MASKED: tl.constexpr):
    """(full_start, full_end), multiples of BLOCK between which no mask is needed, full_start <= full_end.

    start              of all visible pairs
    full_lo, full_hi   between them all pairs are visible; MASKED: nowhere
    """
    full_start = (full_lo + BLOCK - 1) // BLOCK * BLOCK
    full_end = tl.maximum(full_hi, 0) // BLOCK * BLOCK
    if MASKED:
        full_end = full_start
    if full_end <= full_start:
        full_start = start // BLOCK * BLOCK
        full_end = full_start
    return full_start, full_end


@triton.jit
def key_bounds(first, last, lo, hi, batch, view, BLOCK_N: tl.constexpr, MASKED: tl.constexpr):
    """(kv_start, kv_end, full_start, full_end) of the rows first .. last; vectors lo and hi are their key ranges.

    Keys outside [kv_start, kv_end) are hidden from all rows; full_start, full_end and MASKED as in `whole_blocks`.
    """
    if view.key_ranges is None:
        kv_start, full_hi = key_range(first, batch, view)
        full_lo, kv_end = key_range(last, batch, view)
    else:
        kv_start, kv_end = tl.min(tl.where(lo < hi, lo, view.k_len), 0), tl.max(tl.where(lo < hi, hi, 0), 0)
        full_lo, full_hi = tl.max(lo, 0), tl.min(hi, 0)
    full_start, full_end = whole_blocks(kv_start, full_lo, full_hi, BLOCK_N, MASKED)
    return kv_start, kv_end, full_start, full_end


@triton.jit
def pass_bounds(start, end, full_start, full_end, BLOCK: tl.constexpr, PASS: tl.constexpr, IN_ORDER: tl.constexpr):
    """(lo, hi, loop_start, loop_end, gap_start, gap) of a pass over the blocks that touch [start, end).

    lo, hi                 only [lo, hi) is loaded
    loop_start, loop_end   of the loop over the blocks of the pass, in steps of BLOCK
    gap_start, gap         a position from gap_start on stands for the block that begins `gap` later
    PASS                   1, UNMASKED: the blocks in [full_start, full_end). 0: the others, with that gap closed, or,
                           IN_ORDER, those before it. 2: those behind it
    """
    if PASS == 0 and IN_ORDER:
        end, full_end = tl.minimum(end, full_start), full_start
    if PASS == 2:
        start, full_start = tl.maximum(start, full_end), full_end
    loop_start, loop_end = full_start, full_end
    if PASS != UNMASKED:
        loop_start, loop_end = start // BLOCK * BLOCK, end - (full_end - full_start)
    return start, end, loop_start, loop_end, full_start, full_end - full_start


@triton.jit
def visible(offs_m, offs_n, lo, hi, batch, head, view, mask):
    """The visible pairs [BLOCK_M, BLOCK_N]: lo <= j < hi, and the dense mask, a `Strided` or None."""
    keep = offs_n[None, :] < hi[:, None]
    if view.left is not None or view.key_ranges is not None:
        keep = keep & (offs_n[None, :] >= lo[:, None])
    if mask is not None:
        inside = (offs_m < view.q_len)[:, None] & (offs_n < view.k_len)[None, :]
        offsets = offs_m.to(tl.int64)[:, None] * mask.s + offs_n.to(tl.int64)[None, :] * mask.d
        keep = keep & (tl.load(from_row(mask, batch, head, 0, False).ptr + offsets, mask=inside, other=0) != 0)
    return keep


@triton.jit
def rows_of_keys(offs_n, keep, batch, view):
    """(first_row, last_row, keep) of keys: the rows that attend to each, key_ranges apart; keep less hidden keys."""
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
    return first_row, last_row, keep


@triton.jit
def query_bounds(first, last, batch, view, masks, bounds_at, BLOCK_M: tl.constexpr):
    """(m_start, m_end, full_start, full_end) of the keys first .. last, both below k_len: as `key_bounds`.

    bounds_at   index in masks.row_bounds of the first row, and behind it one past the last row, whose key_ranges touch
                the block. With them, or a dense mask, all blocks of rows need a mask
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
    if masks.row_bounds is not None:
        bounds_ptr = masks.row_bounds + bounds_at
        m_start = tl.maximum(m_start, tl.load(bounds_ptr))
        m_end = tl.minimum(m_end, tl.load(bounds_ptr + 1))
    MASKED: tl.constexpr = masks.mask is not None or masks.row_bounds is not None
    full_start, full_end = whole_blocks(m_start, full_lo, full_hi, BLOCK_M, MASKED)
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


@triton.jit
def pair_terms(terms, extent, batch, head, row, key, shift, keep):
    """(biases, factors) of the pairs that keep has: the first in base 2, and 0 for others, the second 1 for others.

    terms           `LogitTerms`: bias [B, Hq, Sq, Sk] of fp16, bf16 or fp32, or None; relative_bias and relative_scale,
                    likewise [B, Hq, Sq, extent]: the pair's entry is row - key + shift, and 0 or 1 outside of it
    row, key        a column and a row of the tile, or the reverse, of indices in the packed axes
    """
    total, factors = 0.0, 1.0
    if terms.bias is not None:
        x = from_row(terms.bias, batch, head, row, False)
        total = tl.load(x.ptr + key.to(tl.int64) * x.d, mask=keep, other=0.0).to(tl.float32)
    if terms.relative_bias is not None:
        x, entry = from_row(terms.relative_bias, batch, head, row, False), row + shift - key
        inside = keep & (entry.to(tl.uint32) < tl.cast(extent, tl.uint32))  # 0 <= entry < extent
        by_distance = tl.load(x.ptr + entry.to(tl.int64) * x.d, mask=inside, other=0.0).to(tl.float32)
        total = by_distance if terms.bias is None else total + by_distance
    if terms.relative_scale is not None:
        x, entry = from_row(terms.relative_scale, batch, head, row, False), row + shift - key
        inside = keep & (entry.to(tl.uint32) < tl.cast(extent, tl.uint32))
        factors = tl.load(x.ptr + entry.to(tl.int64) * x.d, mask=inside, other=1.0).to(tl.float32)
    return total * LOG2_E, factors


@triton.jit
def store_pair_gradients(gradients, x, extent, batch, head, row, key, shift, keep):
    """Store x, the gradients of a tile's logits, as those of the biases of pairs; each pair has one writer.

    gradients       `TensorGradients`: bias and relative_bias, or None; other arguments as of `pair_terms`
    """
    if gradients.bias is not None:
        of_row = from_row(gradients.bias, batch, head, row, False)
        tl.store(of_row.ptr + key.to(tl.int64) * of_row.d, x, mask=keep)
    if gradients.relative_bias is not None:
        of_row, entry = from_row(gradients.relative_bias, batch, head, row, False), row + shift - key
        keep = keep & (entry.to(tl.uint32) < tl.cast(extent, tl.uint32))
        tl.store(of_row.ptr + entry.to(tl.int64) * of_row.d, x, mask=keep)


@triton.jit
def dropout_keeps(dropout_ptr, keep_from, batch_head, rows, first, KEYS: tl.constexpr):
    """True for the pairs of rows and the KEYS keys from `first` on that dropout keeps, as `core.dropout` defines them.

    dropout_ptr   int64 [2]: seed and offset; a pair is kept where its word of Philox is at least keep_from
    batch_head    batch entry * Hq + head
    rows          [M, 1] for a result [M, KEYS], or [1, M] for one [KEYS, M]; rows and first in the packed axes
    first         a multiple of 4 behind the first key of the sequence: each call of Philox gives the words of 4 keys
    """
    groups = first + 4 * tl.arange(0, KEYS // 4)  # [KEYS // 4]
    groups = groups[None, :] if rows.shape[1] == 1 else groups[:, None]
    seed, offset = tl.load(dropout_ptr), tl.load(dropout_ptr + 1)
    zero = (rows + groups) * 0
    counter = zero + groups, zero + rows, zero + batch_head, zero + offset.to(tl.int32)
    w0, w1, w2, w3 = tl.philox(seed, counter[0], counter[1], counter[2], counter[3], 10)
    k0, k1, k2, k3 = is_kept(w0, keep_from), is_kept(w1, keep_from), is_kept(w2, keep_from), is_kept(w3, keep_from)
    IN_COLUMNS: tl.constexpr = rows.shape[1] == 1
    if KEYS < 32 or rows.shape[0] * rows.shape[1] < 32:  # Triton up to 3.8 joins wrong for products of 16: triton#10645
        bits = k0 | k1.to(tl.int32) << 1 | k2.to(tl.int32) << 2 | k3.to(tl.int32) << 3
        bit = 1 << tl.arange(0, 4)  # [4]
        if IN_COLUMNS:
            kept = bits[:, :, None] & bit[None, None, :]  # [M, KEYS // 4, 4]
        else:
            kept = bits[:, None, :] & bit[None, :, None]  # [KEYS // 4, 4, M]
        kept = kept != 0
    else:  # bits, since words would cost more to move
        kept = tl.join(tl.join(k0, k2), tl.join(k1, k3))  # [M, KEYS // 4, 2, 2] or [KEYS // 4, M, 2, 2]
        if not IN_COLUMNS:
            kept = kept.permute(0, 2, 3, 1)
    if IN_COLUMNS:
        kept = kept.reshape(rows.shape[0], KEYS)
    else:
        kept = kept.reshape(KEYS, rows.shape[1])
    return kept


@triton.jit
def is_kept(word, keep_from):
    """word >= keep_from + 2^31, both unsigned."""
    return word.to(tl.int32, bitcast=True) ^ -2147483648 >= keep_from
