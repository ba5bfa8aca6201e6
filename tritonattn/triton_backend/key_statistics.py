"""The pass over the keys: lengths, their prefix sums, and the way back into k."""

from __future__ import annotations

import torch
from torch import Tensor

from ..launch import Arguments, is_wide, plan, stride_arguments
from ..tuning.config import Problem


def key_statistics(k: Tensor, seen: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """Lengths of keys and fp64 prefix sums of lengths and squared lengths, K read once.

    k [B, Hkv, Sk, D]; seen bool, broadcastable to [B, Hkv, Sk], or None. Returns fp32 [B, Hkv, Sk] and fp64
    [B, Hkv, Sk + 1] twice; unseen keys count 0.
    """
    lengths = torch.empty(k.shape[:3], dtype=torch.float32, device=k.device)
    prefix = (*k.shape[:2], k.shape[2] + 1)
    length_prefix, square_prefix = (torch.empty(prefix, dtype=torch.float64, device=k.device) for _ in range(2))
    arguments = _key_arguments(k, seen) | {"lengths_ptr": lengths}
    _launch_keys("key_statistics", arguments, k)
    sums = {"length_prefix_ptr": length_prefix, "square_prefix_ptr": square_prefix}
    _launch_keys("key_prefix_sums", arguments | sums, k)
    return lengths, length_prefix, square_prefix


def key_statistics_backward(k: Tensor, seen: Tensor | None, lengths: Tensor, d_lengths: Tensor) -> Tensor:
    """d_k [B, Hkv, Sk, D] from the lengths that `key_statistics` returned and their gradient, fp32 [B, Hkv, Sk]."""
    d_k = torch.empty_like(k, memory_format=torch.contiguous_format)
    gradients = {"lengths_ptr": lengths.contiguous(), "d_lengths_ptr": d_lengths.contiguous(), "d_k_ptr": d_k}
    _launch_keys("key_statistics_grad", _key_arguments(k, seen) | gradients, k)
    return d_k


def _launch_keys(kernel: str, available: Arguments, k: Tensor) -> None:
    batch, heads, k_len, head_dim = k.shape
    chosen = plan(kernel, Problem(head_dim, head_dim, k.dtype), k.device)
    blocks = 1 if kernel == "key_prefix_sums" else -(-k_len // chosen.config.block_n)
    chosen.launch((blocks, heads, batch), available, is_wide(k))


def _key_arguments(k: Tensor, seen: Tensor | None) -> Arguments:
    arguments = {"k_ptr": k, "seen_ptr": None if seen is None else seen_bytes(seen, k)}
    return arguments | stride_arguments("k", k) | {"k_len": k.shape[2], "kv_heads": k.shape[1]}


def seen_bytes(seen: Tensor, k: Tensor) -> Tensor:
    return seen.expand(k.shape[:3]).contiguous().view(torch.uint8)


