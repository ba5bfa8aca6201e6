"""Checks of the arguments of `attention_varlen`."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..core.visibility import window_sides
from .checks import (
    PACKED,
    PAGED,
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
from .page_checks import check_block_table, check_page_numbers, check_page_size


class Packing(NamedTuple):
    """The arguments that place the sequences."""

    cu_seqlens_q: Tensor
    cu_seqlens_k: Tensor
    max_seqlen_q: int
    max_seqlen_k: int
    block_table: Tensor | None = None

    def longest_k(self, k: Tensor) -> int:
        """At least the keys of the longest sequence, of which no more count than the pages k of a table hold."""
        if self.block_table is None:
            return self.max_seqlen_k
        return min(self.max_seqlen_k, self.block_table.shape[1] * k.shape[1])

    def keys(self, k: Tensor, key_bias: Tensor | None) -> int:
        """T_k: the length of k, or with a block table of the axis along which keys in pages k are counted.

        Where offsets are not read, all that there can be.
        """
        if self.block_table is None:
            return k.shape[0]
        if isinstance(key_bias, Tensor) and key_bias.dim() > 0 and key_bias.shape[-1] != 1:
            return key_bias.shape[-1]
        if values_are_read(self.cu_seqlens_k):
            return int(self.cu_seqlens_k[-1])
        return (self.cu_seqlens_k.shape[0] - 1) * self.longest_k(k)


def check_varlen(q: Tensor, k: Tensor, v: Tensor, packing: Packing, options: Options) -> None:
    """Raise TypeError or ValueError unless these describe one call over packed sequences."""
    check_operands(q, k, v, PACKED if packing.block_table is None else PAGED)
    check_flags(options)
    if options.window is not None:
        check_window(options.window)
    if options.sinks is not None:
        check_sinks(options.sinks, q)
    check_offsets("cu_seqlens_q", packing.cu_seqlens_q, q)
    check_offsets("cu_seqlens_k", packing.cu_seqlens_k, q)
    q_members, k_members = packing.cu_seqlens_q.shape[0] - 1, packing.cu_seqlens_k.shape[0] - 1
    if q_members != k_members:
        raise ValueError(f"cu_seqlens_k: expected as many sequences as cu_seqlens_q has, {q_members}, got {k_members}")
    check_count("max_seqlen_q", packing.max_seqlen_q)
    check_count("max_seqlen_k", packing.max_seqlen_k)
    if packing.block_table is not None:
        check_page_size("k", k, q.shape[1])
        check_block_table(packing.block_table, q_members, q)
        if options.dropout_p > 0:
            raise NotImplementedError(f"dropout_p: expected 0 with a block_table, got {options.dropout_p}")
    k_len = packing.keys(k, options.key_bias)
    if options.key_bias is not None:
        check_key_bias("key_bias", options.key_bias, q, (k.shape[-2], k_len), "[Hq or Hkv, T_k]")
    for side, offsets, longest, length in (
        ("q", packing.cu_seqlens_q, packing.max_seqlen_q, q.shape[0]),
        ("k", packing.cu_seqlens_k, packing.max_seqlen_k, k_len),
    ):
        check_offset_values(f"cu_seqlens_{side}", offsets, length, f"T_{side}")
        _check_longest(side, offsets, longest)
    if packing.block_table is not None:
        _check_pages(packing, packing.block_table, k, options)


def _check_pages(packing: Packing, table: Tensor, k: Tensor, options: Options) -> None:
    """Check that sequences fit into the table, and the pages that rows read."""
    if not (values_are_read(packing.cu_seqlens_q) and values_are_read(packing.cu_seqlens_k)):
        return
    rows, keys = packing.cu_seqlens_q.diff().long(), packing.cu_seqlens_k.diff().long()
    page, capacity = k.shape[1], table.shape[1] * k.shape[1]
    if keys.numel() and int(keys.max()) > capacity:
        raise ValueError(
            f"cu_seqlens_k: expected at most max_pages * page = {capacity} keys a sequence, got {int(keys.max())}"
        )
    left, _ = window_sides(options.window)
    first = torch.zeros_like(keys) if left is None else keys - rows - left
    check_page_numbers(table, page, k.shape[0], first, torch.where(rows > 0, keys, 0), "cu_seqlens_k")


def check_offsets(name: str, offsets: Any, like: Tensor, owner: str = "q") -> None:
    """Raise unless these are int32 [N + 1] on the device of `like`, which belongs to `owner`."""
    check_tensor(name, offsets, "[N + 1]")
    if offsets.dtype != torch.int32:
        raise TypeError(f"{name}: expected dtype torch.int32, got {offsets.dtype}")
    check_device(name, offsets, like, owner)
    if offsets.dim() != 1 or offsets.shape[0] == 0:
        raise ValueError(f"{name}: expected shape [N + 1] for N sequences, got {shape_of(offsets)}")


def check_offset_values(name: str, offsets: Tensor, length: int, axis: str) -> None:
    """On a CPU, raise unless offsets begin with 0, do not fall, and end within `axis`."""
    if not values_are_read(offsets):
        return
    first, last, lengths = int(offsets[0]), int(offsets[-1]), offsets.diff()
    if first != 0:
        raise ValueError(f"{name}: expected a first offset of 0, got {first}")
    if (lengths < 0).any():
        place = int((lengths < 0).int().argmax())
        raise ValueError(
            f"{name}: expected offsets that do not fall, got {int(offsets[place + 1])} after {int(offsets[place])}"
        )
    if last > length:
        raise ValueError(f"{name}: expected offsets of at most {axis} = {length}, got {last}")


def _check_longest(side: str, offsets: Tensor, longest: int) -> None:
    if not values_are_read(offsets):
        return
    lengths = offsets.diff()
    if lengths.numel() and int(lengths.max()) > longest:
        raise ValueError(
            f"max_seqlen_{side}: expected at least the longest sequence, {int(lengths.max())}, got {longest}"
        )
