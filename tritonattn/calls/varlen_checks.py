"""Checks of the arguments of `attention_varlen`."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from .checks import (
    PACKED,
    Options,
    check_count,
    check_device,
    check_flags,
    check_key_bias,
    check_operands,
    check_sinks,
    check_tensor,
    check_window,
    shape_of,
    values_are_read,
)


class Packing(NamedTuple):
    """The arguments that place the sequences."""

    cu_seqlens_q: Tensor
    cu_seqlens_k: Tensor
    max_seqlen_q: int
    max_seqlen_k: int


def check_varlen(q: Tensor, k: Tensor, v: Tensor, packing: Packing, options: Options) -> None:
    """Raise TypeError or ValueError unless these describe one call over packed sequences."""
    check_operands(q, k, v, PACKED)
    check_flags(options)
    if options.window is not None:
        check_window(options.window)
    if options.sinks is not None:
        check_sinks(options.sinks, q)
    if options.key_bias is not None:
        check_key_bias("key_bias", options.key_bias, q, (k.shape[1], k.shape[0]), "[Hq or Hkv, T_k]")
    check_offsets("cu_seqlens_q", packing.cu_seqlens_q, q)
    check_offsets("cu_seqlens_k", packing.cu_seqlens_k, q)
    q_members, k_members = packing.cu_seqlens_q.shape[0] - 1, packing.cu_seqlens_k.shape[0] - 1
    if q_members != k_members:
        raise ValueError(f"cu_seqlens_k: expected as many sequences as cu_seqlens_q has, {q_members}, got {k_members}")
    check_count("max_seqlen_q", packing.max_seqlen_q)
    check_count("max_seqlen_k", packing.max_seqlen_k)
    _check_values("q", packing.cu_seqlens_q, packing.max_seqlen_q, q.shape[0])
    _check_values("k", packing.cu_seqlens_k, packing.max_seqlen_k, k.shape[0])


def check_offsets(name: str, offsets: Any, q: Tensor) -> None:
    """Raise unless these are int32 [N + 1] on q's device."""
    check_tensor(name, offsets, "[N + 1]")
    if offsets.dtype != torch.int32:
        raise TypeError(f"{name}: expected dtype torch.int32, got {offsets.dtype}")
    check_device(name, offsets, q)
    if offsets.dim() != 1 or offsets.shape[0] == 0:
        raise ValueError(f"{name}: expected shape [N + 1] for N sequences, got {shape_of(offsets)}")


def _check_values(side: str, offsets: Tensor, longest: int, length: int) -> None:
    if not values_are_read(offsets):
        return
    first, last, lengths = int(offsets[0]), int(offsets[-1]), offsets.diff()
    if first != 0:
        raise ValueError(f"cu_seqlens_{side}: expected a first offset of 0, got {first}")
    if (lengths < 0).any():
        place = int((lengths < 0).int().argmax())
        raise ValueError(
            f"cu_seqlens_{side}: expected offsets that do not fall, got {int(offsets[place + 1])} after"
            f" {int(offsets[place])}"
        )
    if last > length:
        raise ValueError(f"cu_seqlens_{side}: expected offsets of at most T_{side} = {length}, got {last}")
    if lengths.numel() and int(lengths.max()) > longest:
        raise ValueError(
            f"max_seqlen_{side}: expected at least the longest sequence, {int(lengths.max())}, got {longest}"
        )
