"""Launches for key statistics: norms of keys, their gradient, and the buffers of a cache."""

from __future__ import annotations

import torch
from torch import Tensor

from ...tuning.config import Problem
from . import key_statistics_kernels as kernels
from .launch import KERNELS, Arguments, are_aligned, forms_of, is_wide, kept_kind, pages_of, plan, scale_of, strided
from .ranges import NO_HEADS, seen_bytes
from .records import KeyBuffers

KERNELS |= {
    "key_statistics": kernels.key_norms,
    "prefix_sums": kernels.prefix_sums,
    "key_statistics_grad": kernels.key_statistics_grad,
    "append_keys": kernels.append_keys,
    "append_to_pages": kernels.append_to_pages,
}

# Up to this many new keys, the program of a head computes norms while it adds up; for more, a pass before does.
_FEW_KEYS = 64


def key_norms(k: Tensor, seen: Tensor | None) -> Tensor:
    """Norms of the keys k [B, Hkv, Sk, D]: fp32 [B, Hkv, Sk].

    seen   bool, broadcastable to [B, Hkv, Sk], or None; unseen keys have norm 0
    """
    k = _with_usual_strides(k)
    norms = torch.empty(k.shape[:3], dtype=torch.float32, device=k.device)
    _launch_keys("key_statistics", _key_arguments(k, seen) | {"norms_ptr": norms}, k)
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
    _launch_keys("key_statistics_grad", _key_arguments(k, seen) | gradients, k)
    return d_k


def append_keys(k: Tensor, new_counts: Tensor | None, buffers: tuple[Tensor, ...]) -> None:
    """Append the next keys k [B, Hkv, n, D] to the buffers of a fp32 `KeyStatistics`, given in the order of its list.

    new_counts   integers [B], how many of the n are keys, or None for all
    """
    k = _with_usual_strides(k)
    counts, norms, norm_sums, norm_square_sums, norm_maxima = buffers
    counts_after = torch.empty_like(counts)
    arguments = _key_arguments(k, None) | {
        "new_norms_ptr": key_norms(k, None) if k.shape[2] > _FEW_KEYS else None,
        "new_counts_ptr": None if new_counts is None else new_counts.long().contiguous(),
        "buffers": KeyBuffers(counts, counts_after, norms, norm_sums, norm_square_sums, norm_maxima),
        "capacity": norms.shape[2] - 1,
    }
    _launch_keys("append_keys", arguments, k)
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
    arguments: Arguments = {
        "new_norms_ptr": key_norms(k.transpose(0, 1)[None], None),
        "starts_ptr": cu_seqlens.int().contiguous(),
        "key_lengths_ptr": key_lengths_after.int().contiguous(),
        "pages": pages_of(block_table, *buffers[0].shape[:2]),
        "buffers": KeyBuffers(None, None, *(scale_of(x.transpose(1, 2)) for x in buffers)),
        "k_len": total,
        "kv_heads": kv_heads,
    }
    kind = kept_kind(tuple(forms_of(block_table, *buffers)), lambda: (NO_HEADS, False))
    chosen = plan("append_to_pages", kind.problem, k.device)
    grid = (-(-kv_heads // chosen.config.block_m), 1, len(key_lengths_after))
    for _ in range(passes):
        chosen.launch(grid, arguments, False, kind)


def _with_usual_strides(k: Tensor) -> Tensor:
    """The keys, or a contiguous copy of a view into wider rows, whose loads, and so sums, would be others."""
    step = 16 if k.shape[3] % 16 == 0 else 16 // k.dtype.itemsize
    if k.shape[3] % step:
        return k.contiguous()
    usual = all([stride % step == 0 for size, stride in zip(k.shape[:3], k.stride(), strict=False) if size > 1])
    return k if usual and are_aligned(k) else k.clone(memory_format=torch.contiguous_format)


def _launch_keys(kernel: str, available: Arguments, k: Tensor) -> None:
    batch, heads, k_len, _ = k.shape
    present = [getattr(value, "dtype", value is None) for value in available.values()]
    kind = kept_kind((*forms_of(k), *present), lambda: (_problem(k), is_wide(k)))
    chosen = plan(kernel, kind.problem, k.device)
    blocks = 1 if kernel == "append_keys" else -(-k_len // chosen.config.block_n)  # its sums go through all keys
    chosen.launch((blocks, heads, batch), available, kind.wide, kind)


def _problem(k: Tensor) -> Problem:
    return Problem(k.shape[3], k.shape[3], k.dtype, aligned=are_aligned(k), invariant=True)


def _key_arguments(k: Tensor, seen: Tensor | None) -> Arguments:
    seen = None if seen is None else seen_bytes(seen, k.shape[:3])
    return {"k": strided(k), "seen_ptr": seen, "k_len": k.shape[2], "kv_heads": k.shape[1]}
