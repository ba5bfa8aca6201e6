"""Lengths of keys, their fp64 prefix sums, and the way back of a statistic's gradient into k."""

from __future__ import annotations

import triton
import triton.language as tl

from .primitives import COUNTS, LENGTHS, load_tile, program_position, store_tile, tile_offsets

# Below fp32's smallest normal number a length counts as 0.
SMALLEST_NORMAL = tl.constexpr(1.1754943508222875e-38)


@triton.jit(do_not_specialize=LENGTHS, do_not_specialize_on_alignment=COUNTS)
def key_lengths(
    k_ptr, seen_ptr, lengths_ptr, k_len, kv_heads, first_head, first_member,
    k_stride_b, k_stride_h, k_stride_s, k_stride_d,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_N: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """Euclidean length of BLOCK_N keys of one (batch, kv head), the largest component factored out.

    Grid: (blocks of Sk, Hkv, B). k [B, Hkv, Sk, D] any strides; seen uint8 [B, Hkv, Sk] contiguous or None, keys
    that no row sees are not read and have length 0; lengths fp32 [B, Hkv, Sk] contiguous.
    """
    block, head, batch = program_position(first_head, first_member, LAST_FIRST=False)
    wide_batch, wide_head = batch.to(tl.int64), head.to(tl.int64)
    first_key = block * BLOCK_N
    offs_n = first_key + tl.arange(0, BLOCK_N)
    keep_key = offs_n < k_len
    key_offsets = (wide_batch * kv_heads + wide_head) * k_len + offs_n
    load_key = keep_key
    if seen_ptr is not None:
        load_key = load_key & (tl.load(seen_ptr + key_offsets, mask=keep_key, other=0) != 0)
    k_ptr += wide_batch * k_stride_b + wide_head * k_stride_h + first_key.to(tl.int64) * k_stride_s
    k = load_tile(k_ptr + tile_offsets(BLOCK_N, BLOCK_D, k_stride_s, k_stride_d, WIDE), load_key, HEAD_DIM, True)
    magnitude = tl.abs(k.to(tl.float32))
    largest = tl.max(magnitude, 1)
    unit = magnitude / tl.where(largest > 0.0, largest, 1.0)[:, None]
    tl.store(lengths_ptr + key_offsets, largest * tl.sqrt(tl.sum(unit * unit, 1)), mask=keep_key)


@triton.jit(do_not_specialize=LENGTHS, do_not_specialize_on_alignment=COUNTS)
def key_prefix_sums(
    lengths_ptr, length_prefix_ptr, square_prefix_ptr, k_len, kv_heads, first_head, first_member,
    BLOCK_N: tl.constexpr,
):  # fmt: skip
    """fp64 sums of lengths and of their squares over the keys before j, j = 0 .. Sk, of one (batch, kv head).

    Grid: (1, Hkv, B). lengths fp32 [B * Hkv, Sk]; both prefixes fp64 [B * Hkv, Sk + 1], contiguous.
    """
    _, head, batch = program_position(first_head, first_member, LAST_FIRST=False)
    row = batch.to(tl.int64) * kv_heads + head
    lengths_ptr += row * k_len
    length_prefix_ptr += row * (k_len + 1)
    square_prefix_ptr += row * (k_len + 1)
    length_sum = tl.zeros([1], tl.float64)
    square_sum = tl.zeros([1], tl.float64)
    tl.store(length_prefix_ptr + tl.arange(0, 1), length_sum)
    tl.store(square_prefix_ptr + tl.arange(0, 1), square_sum)
    for start_n in range(0, k_len, BLOCK_N):
        offs_n = start_n + tl.arange(0, BLOCK_N)
        keep_key = offs_n < k_len
        length = tl.load(lengths_ptr + offs_n, mask=keep_key, other=0.0).to(tl.float64)
        square = length * length
        tl.store(length_prefix_ptr + 1 + offs_n, length_sum + tl.cumsum(length, 0), mask=keep_key)
        tl.store(square_prefix_ptr + 1 + offs_n, square_sum + tl.cumsum(square, 0), mask=keep_key)
        length_sum += tl.sum(length, 0)
        square_sum += tl.sum(square, 0)


@triton.jit(do_not_specialize=LENGTHS, do_not_specialize_on_alignment=COUNTS)
def key_statistics_grad(
    k_ptr, seen_ptr, lengths_ptr, d_lengths_ptr, d_k_ptr, k_len, kv_heads, first_head, first_member,
    k_stride_b, k_stride_h, k_stride_s, k_stride_d,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_N: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """d_k[j] = d_lengths[j] * k[j] / |k[j]| for BLOCK_N keys; 0 where |k[j]| is 0 or below fp32's normal range.

    Grid: (blocks of Sk, Hkv, B). lengths and d_lengths fp32 [B, Hkv, Sk] contiguous; d_k [B, Hkv, Sk, D] in k's
    dtype, contiguous.
    """
    block, head, batch = program_position(first_head, first_member, LAST_FIRST=False)
    wide_batch, wide_head = batch.to(tl.int64), head.to(tl.int64)
    first_key = block * BLOCK_N
    offs_n = first_key + tl.arange(0, BLOCK_N)
    keep_key = offs_n < k_len
    key_base = (wide_batch * kv_heads + wide_head) * k_len + first_key
    key_offsets = key_base + tl.arange(0, BLOCK_N)
    load_key = keep_key
    if seen_ptr is not None:
        load_key = load_key & (tl.load(seen_ptr + key_offsets, mask=keep_key, other=0) != 0)
    length = tl.load(lengths_ptr + key_offsets, mask=load_key, other=0.0)
    live = load_key & (length >= SMALLEST_NORMAL)
    d_length = tl.load(d_lengths_ptr + key_offsets, mask=live, other=0.0)
    k_ptr += wide_batch * k_stride_b + wide_head * k_stride_h + first_key.to(tl.int64) * k_stride_s
    k = load_tile(k_ptr + tile_offsets(BLOCK_N, BLOCK_D, k_stride_s, k_stride_d, WIDE), live, HEAD_DIM, True)
    d_k = k.to(tl.float32) / tl.where(live, length, 1.0)[:, None] * d_length[:, None]
    d_k_ptrs = d_k_ptr + key_base * HEAD_DIM + tile_offsets(BLOCK_N, BLOCK_D, HEAD_DIM, 1, False)
    store_tile(d_k_ptrs, d_k, keep_key, HEAD_DIM)
