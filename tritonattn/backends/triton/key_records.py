"""Kernels that fill the buffers of key statistics: norms of a cache's keys, and their running sums and maxima."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .block import LENGTHS, from_row, load_tile, page_slots, program_position, tile_offsets
from .key_norms import key_norms, launch_keys, norms_of, with_usual_strides
from .launch import KERNELS, kept_specialisation, plan, vector_form
from .ranges import NO_HEADS
from .records import Arguments, KeyBuffers, pages_of, scale_of


@triton.jit
def _larger(a, b):
    """The larger of two; NaN wins, which tl.maximum would ignore."""
    return tl.where((b > a) | (b != b), b, a)


@triton.jit
def _running(norms, norm_sum, norm_square_sum, norm_max):
    """Running sums of norms [N] or [N, heads] and of squares, fp64, and maxima, from those before on."""
    wide = norms.to(tl.float64)
    norm_sums = norm_sum + tl.cumsum(wide, 0)
    norm_square_sums = norm_square_sum + tl.cumsum(wide * wide, 0)
    return norm_sums, norm_square_sums, _larger(norm_max, tl.associative_scan(norms, 0, _larger))


@triton.jit
def _last(x, is_last):
    return tl.sum(tl.where(is_last, x, 0.0), 0)


@triton.jit(do_not_specialize=LENGTHS)
def append_keys_kernel(
    k,
    new_norms_ptr,
    new_counts_ptr,
    buffers,
    k_len,
    capacity,
    kv_heads,
    first_y,
    first_z,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_N: tl.constexpr,
    WIDE: tl.constexpr,
    ALIGNED: tl.constexpr,
    INVARIANT: tl.constexpr,
):
    """Append the next keys of one (batch, kv head) to the buffers of a `KeyStatistics`.

    Grid: (1, Hkv, B). k [B, Hkv, k_len, D] any strides; the buffers contiguous, one entry longer than KeyStatistics
    shows them: norms fp32 [B, Hkv, capacity + 1], norm_sums, norm_square_sums fp64 and norm_maxima fp32 [B, Hkv,
    capacity + 2].

    new_norms    fp32 [B, Hkv, k_len], contiguous, the norms of k, which is then not read; or None
    new_counts   int64 [B] or None: how many of the k_len are keys; None is all. Keys past the capacity are dropped
    counts       int64 [B]: how many there are. Other programs read it too, so counts_after is another tensor

    Sums are taken as in `append_to_pages`, in blocks that begin at multiples of STEP keys: their bits do not depend on
    how keys are cut into calls. New norms pass through memory, so that those of a block stand in one layout.
    """
    _, head, batch = program_position(first_y, first_z, LAST_FIRST=False)
    held = tl.load(buffers.counts + batch).to(tl.int32)
    new = held * 0 + k_len
    if new_counts_ptr is not None:
        new = tl.minimum(new, tl.load(new_counts_ptr + batch).to(tl.int32))
    new = tl.maximum(tl.minimum(new, capacity - held), 0)
    row = batch.to(tl.int64) * kv_heads + head.to(tl.int64)
    norms_ptr = buffers.norms + row * (capacity + 1)
    k = from_row(k, batch, head, 0, ALIGNED)
    k_offsets = tile_offsets(tl.arange(0, BLOCK_N), BLOCK_D, k.s, k.d, WIDE)  # [BLOCK_N, BLOCK_D]
    STEP: tl.constexpr = BLOCK_N * 4
    WIDTH: tl.constexpr = BLOCK_N if new_norms_ptr is None else STEP
    for start in range(0, k_len, WIDTH):
        offs_n = start + tl.arange(0, WIDTH)  # [WIDTH]
        keep_key = offs_n < new
        if new_norms_ptr is None:
            k_ptrs = k.ptr + tl.cast(start, tl.int64) * k.s + k_offsets  # [BLOCK_N, BLOCK_D]
            norm = norms_of(load_tile(k_ptrs, keep_key, HEAD_DIM))  # [WIDTH]
        else:
            norm = tl.load(new_norms_ptr + row * k_len + offs_n, mask=keep_key, other=0.0)
        tl.store(norms_ptr + held + offs_n, norm, mask=keep_key)
    tl.debug_barrier()

    first_block = held // STEP * STEP
    sums_base = row * (capacity + 2) + first_block
    norm_sum, square_sum = tl.load(buffers.norm_sums + sums_base), tl.load(buffers.norm_square_sums + sums_base)
    maximum = tl.load(buffers.norm_maxima + sums_base)
    order = tl.arange(0, STEP)
    for start in range(first_block, held + new, STEP):
        offs_key = start + order  # [STEP]
        keep_key = offs_key < held + new
        is_new = keep_key & (offs_key >= held)
        norm = tl.load(norms_ptr + offs_key, mask=keep_key, other=0.0)
        norm_sums, square_sums, maxima = _running(norm, norm_sum, square_sum, maximum)
        entries = row * (capacity + 2) + 1 + offs_key
        tl.store(buffers.norm_sums + entries, norm_sums, mask=is_new)
        tl.store(buffers.norm_square_sums + entries, square_sums, mask=is_new)
        tl.store(buffers.norm_maxima + entries, maxima, mask=is_new)
        is_last = order == STEP - 1
        norm_sum, square_sum, maximum = _last(norm_sums, is_last), _last(square_sums, is_last), _last(maxima, is_last)
    if head == 0:
        tl.store(buffers.counts_after + batch, held + new)


@triton.jit
def _entries(x, number, slot, heads):
    """Pointers to the entries [n, heads] of x, a `Scale` of pages [N, Hkv, page], at n slots of numbered pages."""
    entry = number.to(tl.int64) * (x.b >> 4) + slot.to(tl.int64) * x.s
    return x.ptr + (entry[:, None] + heads.to(tl.int64)[None, :] * (x.h >> 4))


@triton.jit(do_not_specialize=LENGTHS)
def append_to_pages_kernel(
    new_norms_ptr,
    starts_ptr,
    key_lengths_ptr,
    pages,
    buffers,
    k_len,
    kv_heads,
    first_y,
    first_z,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Enter the newest keys of one sequence, for BLOCK_M heads, in the buffers of a `PagedKeyStatistics`.

    Grid: (blocks of Hkv, 1, B). new_norms fp32 [Hkv, k_len], contiguous; starts int32 [B + 1], where the sequences'
    new keys begin and end among the k_len, clamped; key_lengths int32 [B], with the new keys; pages `Pages` of the
    sequences; the buffers, counts None, each a `Scale` of [N, Hkv, page]. Keys without a page are dropped.

    Sums are taken in blocks that begin at multiples of BLOCK_N keys, from the entry of the last key before: their bits
    do not depend on how keys are cut into calls. Where old keys begin a block, their norms are read.
    """
    block, _, sequence = program_position(first_y, first_z, LAST_FIRST=False)
    heads = block * BLOCK_M + tl.arange(0, BLOCK_M)  # [BLOCK_M]
    keep_head = heads < kv_heads
    start = tl.minimum(tl.maximum(tl.load(starts_ptr + sequence), 0), k_len)
    new = tl.minimum(tl.maximum(tl.load(starts_ptr + sequence + 1), start), k_len) - start
    end = tl.load(key_lengths_ptr + sequence)
    held = end - new
    first_block = tl.maximum(held, 0) // BLOCK_N * BLOCK_N
    last = first_block - 1 + tl.arange(0, 1)
    last_number, last_slot, has_last = page_slots(pages, sequence, last, last >= 0)
    keep_entry = has_last[:, None] & keep_head[None, :]
    norm_sum = tl.load(_entries(buffers.norm_sums, last_number, last_slot, heads), mask=keep_entry, other=0.0)
    square_sum = tl.load(_entries(buffers.norm_square_sums, last_number, last_slot, heads), mask=keep_entry, other=0.0)
    maximum = tl.load(_entries(buffers.norm_maxima, last_number, last_slot, heads), mask=keep_entry, other=0.0)
    order = tl.arange(0, BLOCK_N)
    is_last = (order == BLOCK_N - 1)[:, None]
    for first in range(first_block, end, BLOCK_N):
        offs_key = first + order  # [BLOCK_N]
        number, slot, is_held = page_slots(pages, sequence, offs_key, offs_key < end)
        keep = is_held[:, None] & keep_head[None, :]  # [BLOCK_N, BLOCK_M]
        is_new = (offs_key >= held)[:, None]
        norm_ptrs = new_norms_ptr + heads.to(tl.int64)[None, :] * k_len + (start - held + offs_key)[:, None]
        new_norms = tl.load(norm_ptrs, mask=keep & is_new, other=0.0)
        norm_entries = _entries(buffers.norms, number, slot, heads)
        norms = tl.where(is_new, new_norms, tl.load(norm_entries, mask=keep & ~is_new, other=0.0))
        norm_sums, square_sums, maxima = _running(norms, norm_sum, square_sum, maximum)
        tl.store(norm_entries, norms, mask=keep & is_new)
        tl.store(_entries(buffers.norm_sums, number, slot, heads), norm_sums, mask=keep & is_new)
        tl.store(_entries(buffers.norm_square_sums, number, slot, heads), square_sums, mask=keep & is_new)
        tl.store(_entries(buffers.norm_maxima, number, slot, heads), maxima, mask=keep & is_new)
        norm_sum = _last(norm_sums, is_last)[None, :]
        square_sum = _last(square_sums, is_last)[None, :]
        maximum = _last(maxima, is_last)[None, :]


KERNELS |= {"append_keys": append_keys_kernel, "append_to_pages": append_to_pages_kernel}

# Up to this many new keys, the program of a head computes norms while it adds up; for more, a pass before does.
_FEW_KEYS = 64


def append_keys(k: Tensor, new_counts: Tensor | None, buffers: tuple[Tensor, ...]) -> None:
    """Append the next keys k [B, Hkv, n, D] to the buffers of a fp32 `KeyStatistics`, given in the order of its list.

    new_counts   integers [B], how many of the n are keys, or None for all
    """
    k = with_usual_strides(k)
    counts, norms, norm_sums, norm_square_sums, norm_maxima = buffers
    counts_after = torch.empty_like(counts)
    arguments: Arguments = {
        "new_norms_ptr": key_norms(k, None) if k.shape[2] > _FEW_KEYS else None,
        "new_counts_ptr": None if new_counts is None else new_counts.long().contiguous(),
        "buffers": KeyBuffers(counts, counts_after, norms, norm_sums, norm_square_sums, norm_maxima),
        "capacity": norms.shape[2] - 1,
    }
    launch_keys("append_keys", k, None, arguments)
    counts.copy_(counts_after)


def append_to_pages(
    k: Tensor,
    cu_seqlens: Tensor,
    key_lengths_after: Tensor,
    block_table: Tensor,
    buffers: tuple[Tensor, ...],
    passes: int = 1,
) -> None:
    """Enter the keys k [T, Hkv, D] in the buffers of a fp32 `PagedKeyStatistics`, as its `enter`.

    buffers   norms, norm_sums, norm_square_sums, norm_maxima: [N, page, Hkv] of any strides
    """
    total, kv_heads, _ = k.shape
    buffers = tuple(x.transpose(1, 2) for x in buffers)  # [N, Hkv, page]
    arguments: Arguments = {
        "new_norms_ptr": key_norms(k.transpose(0, 1)[None], None),
        "starts_ptr": cu_seqlens.int().contiguous(),
        "key_lengths_ptr": key_lengths_after.int().contiguous(),
        "pages": pages_of(block_table, buffers[0].shape[0], buffers[0].shape[2]),
        "buffers": KeyBuffers(None, None, *map(scale_of, buffers)),
        "k_len": total,
        "kv_heads": kv_heads,
    }
    forms = tuple(vector_form(x.shape, x.stride(), x.dtype) for x in buffers)
    specialisation = kept_specialisation(forms, lambda: (NO_HEADS, False))
    chosen = plan("append_to_pages", specialisation, k.device)
    grid = (-(-kv_heads // chosen.config.block_m), 1, len(key_lengths_after))
    for _ in range(passes):
        chosen.launch(grid, arguments, specialisation)
