"""Norms of keys, their gradient, and fp64 prefix sums."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...tuning.config import Problem
from .block import LENGTHS, from_row, load_tile, program_position, tile_offsets
from .launch import KERNELS, forms_of, is_aligned, is_wide, kept_specialisation, plan
from .ranges import NO_HEADS, seen_bytes
from .records import Arguments, Strided

# Below fp32's smallest normal number a norm counts as 0.
SMALLEST_NORMAL = tl.constexpr(1.1754943508222875e-38)


@triton.jit
def norms_of(k):
    """Euclidean norms of keys [N, D], fp32, with the largest component factored out."""
    magnitude = tl.abs(k.to(tl.float32))
    largest = tl.max(magnitude, 1)
    unit = magnitude / tl.where(largest > 0.0, largest, 1.0)[:, None]
    return largest * tl.sqrt(tl.sum(unit * unit, 1))


@triton.jit(do_not_specialize=LENGTHS)
def key_statistics_kernel(
    k,
    seen_ptr,
    norms_ptr,
    k_len,
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
    """Euclidean norm of BLOCK_N keys of one (batch, kv head).

    Grid: (blocks of Sk, Hkv, B). k [B, Hkv, Sk, D] any strides; seen uint8 [B, Hkv, Sk] contiguous or None, keys
    that no row attends to are not read and have norm 0; norms fp32 [B, Hkv, Sk] contiguous.
    """
    block, head, batch = program_position(first_y, first_z, LAST_FIRST=False)
    first_key = block * BLOCK_N
    block_keys = tl.arange(0, BLOCK_N)
    offs_n = first_key + block_keys  # [BLOCK_N]
    keep_key = offs_n < k_len
    key_offsets = (batch.to(tl.int64) * kv_heads + head.to(tl.int64)) * k_len + offs_n
    load_key = keep_key
    if seen_ptr is not None:
        load_key = load_key & (tl.load(seen_ptr + key_offsets, mask=keep_key, other=0) != 0)
    k = from_row(k, batch, head, first_key, ALIGNED)
    k_ptrs = k.ptr + tile_offsets(block_keys, BLOCK_D, k.s, k.d, WIDE)  # [BLOCK_N, BLOCK_D]
    tl.store(norms_ptr + key_offsets, norms_of(load_tile(k_ptrs, load_key, HEAD_DIM)), mask=keep_key)


@triton.jit
def _restarting(restarts, total, next_restarts, next_total):
    """Two neighbouring stretches as one: if a sum begins again there, and the sum since."""
    return restarts | next_restarts, tl.where(next_restarts != 0, next_total, total + next_total)


@triton.jit(do_not_specialize=LENGTHS)
def prefix_sums_kernel(
    addends_ptr,
    restarts_ptr,
    sums_ptr,
    addends_len,
    q_heads,
    first_y,
    first_z,
    BLOCK_N: tl.constexpr,
):
    """fp64 sums of addends over [0, j), j = 0 .. n, of one (batch, head).

    Grid: (1, H, B). addends [B, H, n] of any float dtype, sums fp64 [B, H, n + 1], both contiguous; n = addends_len.
    restarts uint8 [B, H, n], contiguous, or None: the sums begin again at these addends.
    """
    _, head, batch = program_position(first_y, first_z, LAST_FIRST=False)
    row = batch.to(tl.int64) * q_heads + head
    addends_ptr += row * addends_len
    sums_ptr += row * (addends_len + 1)
    total = tl.zeros([1], tl.float64)
    tl.store(sums_ptr + tl.arange(0, 1), total)
    for start in range(0, addends_len, BLOCK_N):
        offs_n = start + tl.arange(0, BLOCK_N)  # [BLOCK_N]
        keep = offs_n < addends_len
        addends = tl.load(addends_ptr + offs_n, mask=keep, other=0.0).to(tl.float64)
        if restarts_ptr is None:
            tl.store(sums_ptr + 1 + offs_n, total + tl.cumsum(addends, 0), mask=keep)
            total += tl.sum(addends, 0)
        else:
            restarts = tl.load(restarts_ptr + row * addends_len + offs_n, mask=keep, other=0).to(tl.int32)
            has_restarted, sums = tl.associative_scan((restarts, addends), 0, _restarting)
            sums = tl.where(has_restarted != 0, sums, total + sums)
            tl.store(sums_ptr + 1 + offs_n, sums, mask=keep)
            is_last = tl.arange(0, BLOCK_N) == BLOCK_N - 1
            total = tl.zeros([1], tl.float64) + tl.sum(tl.where(is_last, sums, 0.0), 0)


@triton.jit(do_not_specialize=LENGTHS)
def key_statistics_grad_kernel(
    k,
    seen_ptr,
    norms_ptr,
    d_norms_ptr,
    added_ptr,
    d_k_ptr,
    k_len,
    kv_heads,
    first_y,
    first_z,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_N: tl.constexpr,
    WIDE: tl.constexpr,
    ALIGNED: tl.constexpr,
):
    """d_k[j] = d_norms[j] * k[j] / |k[j]| for BLOCK_N keys; 0 where |k[j]| is 0 or below fp32's normal range.

    Grid: (blocks of Sk, Hkv, B). norms and d_norms fp32 [B, Hkv, Sk] contiguous; d_k [B, Hkv, Sk, D] in k's
    dtype, contiguous; added is fp32 like d_k, or None: k's gradient by other ways, added before rounding.
    """
    block, head, batch = program_position(first_y, first_z, LAST_FIRST=False)
    first_key = block * BLOCK_N
    block_keys = tl.arange(0, BLOCK_N)
    offs_n = first_key + block_keys  # [BLOCK_N]
    keep_key = offs_n < k_len
    key_base = (batch.to(tl.int64) * kv_heads + head.to(tl.int64)) * k_len + first_key
    key_offsets = key_base + block_keys
    load_key = keep_key
    if seen_ptr is not None:
        load_key = load_key & (tl.load(seen_ptr + key_offsets, mask=keep_key, other=0) != 0)
    norm = tl.load(norms_ptr + key_offsets, mask=load_key, other=0.0)
    live = load_key & (norm >= SMALLEST_NORMAL)
    d_norm = tl.load(d_norms_ptr + key_offsets, mask=live, other=0.0)
    k = from_row(k, batch, head, first_key, ALIGNED)
    k_ptrs = k.ptr + tile_offsets(block_keys, BLOCK_D, k.s, k.d, WIDE)  # [BLOCK_N, BLOCK_D]
    k_tile = load_tile(k_ptrs, live, HEAD_DIM)  # [BLOCK_N, BLOCK_D]
    d_k = k_tile.to(tl.float32) / tl.where(live, norm, 1.0)[:, None] * d_norm[:, None]
    offsets = key_base * HEAD_DIM + tile_offsets(block_keys, BLOCK_D, HEAD_DIM, 1, False)
    if added_ptr is not None:
        d_k += load_tile(added_ptr + offsets, keep_key, HEAD_DIM).to(tl.float32)
    keep = keep_key[:, None] & (tl.arange(0, BLOCK_D)[None, :] < HEAD_DIM)
    tl.store(d_k_ptr + offsets, d_k.to(d_k_ptr.dtype.element_ty), mask=keep)


KERNELS |= {
    "key_statistics": key_statistics_kernel,
    "prefix_sums": prefix_sums_kernel,
    "key_statistics_grad": key_statistics_grad_kernel,
}


def key_norms(k: Tensor, seen: Tensor | None) -> Tensor:
    """Norms of the keys k [B, Hkv, Sk, D]: fp32 [B, Hkv, Sk].

    seen   bool, broadcastable to [B, Hkv, Sk], or None; unseen keys have norm 0
    """
    k = with_usual_strides(k)
    norms = torch.empty(k.shape[:3], dtype=torch.float32, device=k.device)
    launch_keys("key_statistics", k, seen, {"norms_ptr": norms})
    return norms


def key_norms_backward(
    k: Tensor, seen: Tensor | None, norms: Tensor, d_norms: Tensor, added: Tensor | None = None
) -> Tensor:
    """d_k [B, Hkv, Sk, D] from the norms that `key_norms` returned and their gradient, fp32 [B, Hkv, Sk].

    added   k's gradient by other ways, fp32 [B, Hkv, Sk, D], or None
    """
    d_k = torch.empty_like(k, memory_format=torch.contiguous_format)
    gradients: Arguments = {"norms_ptr": norms.contiguous(), "d_norms_ptr": d_norms.contiguous()}
    gradients |= {"added_ptr": None if added is None else added.contiguous(), "d_k_ptr": d_k}
    launch_keys("key_statistics_grad", k, seen, gradients)
    return d_k


def prefix_sums(addends: Tensor, restarts: Tensor | None = None) -> Tensor:
    """fp64 sums of addends [B, H, n], of any float dtype, over [0, j), j = 0 .. n: [B, H, n + 1].

    restarts   bool, broadcastable to the addends, or None: the sums begin again there, as in `ranges.prefix_sum`
    """
    batch, heads, count = addends.shape
    sums = torch.empty((batch, heads, count + 1), dtype=torch.float64, device=addends.device)
    arguments = {"addends_ptr": addends.contiguous(), "sums_ptr": sums, "addends_len": count, "q_heads": heads}
    arguments |= {"restarts_ptr": None if restarts is None else seen_bytes(restarts, addends.shape)}
    specialisation = kept_specialisation((addends.dtype, restarts is None), lambda: (NO_HEADS, False))
    plan("prefix_sums", specialisation, addends.device).launch((1, heads, batch), arguments, specialisation)
    return sums


def with_usual_strides(k: Tensor) -> Tensor:
    """The keys, or a contiguous copy where unaligned rows would be loaded, and so summed, in another order."""
    step = 16 if k.shape[3] % 16 == 0 else 16 // k.dtype.itemsize
    if k.shape[3] % step:
        return k.contiguous()
    usual, shape, strides = is_aligned(k), k.shape, k.stride()
    for axis in range(3):  # no generator: a call asks of all its keys
        usual = usual and (shape[axis] == 1 or strides[axis] % step == 0)
    return k if usual else k.clone(memory_format=torch.contiguous_format)


def launch_keys(kernel: str, k: Tensor, seen: Tensor | None, arguments: Arguments) -> None:
    """Launch a pass over keys. seen: of `key_norms`; arguments: others than those of all such passes."""
    batch, heads, k_len, _ = k.shape
    seen = None if seen is None else seen_bytes(seen, k.shape[:3])
    available = {"k": Strided(k, *k.stride()), "seen_ptr": seen, "k_len": k_len, "kv_heads": heads, **arguments}
    key: list[Any] = [*forms_of(None, k), k.shape[3]]
    for value in available.values():  # no comprehension: each is one more call before Python 3.12
        key.append(getattr(value, "dtype", value is None))
    specialisation = kept_specialisation(tuple(key), lambda: (_problem(k), is_wide(k)))
    chosen = plan(kernel, specialisation, k.device)
    blocks = 1 if kernel == "append_keys" else -(-k_len // chosen.config.block_n)  # its sums go through all keys
    chosen.launch((blocks, heads, batch), available, specialisation)


def _problem(k: Tensor) -> Problem:
    return Problem(k.shape[3], k.shape[3], k.dtype, aligned=is_aligned(k), invariant=True)
