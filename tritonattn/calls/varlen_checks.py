"""Checks of the arguments of `attention_varlen`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..core.sequences import Sequences
from ..core.visibility import Visibility, window_sides
from .checks import (
    PACKED,
    PAGED,
    Layout,
    check_count,
    check_device,
    check_masks,
    check_tensor,
    shape_of,
    values_are_read,
)
from .page_checks import check_block_table, check_page_numbers, check_page_size


@dataclass(frozen=True, eq=False)  # Dynamo of torch 2.8 takes no property of a NamedTuple
class Packing:
    """The arguments that say where the sequences lie."""

    cu_seqlens_q: Tensor
    cu_seqlens_k: Tensor
    max_seqlen_q: int
    max_seqlen_k: int
    block_table: Tensor | None = None

    @property
    def layout(self) -> Layout:
        return PACKED if self.block_table is None else PAGED

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

    def visibility(self, q: Tensor, k: Tensor, k_len: int, **masks: Any) -> Visibility:
        """Which of the `keys` each row attends to, of checked arguments: q [T_q, Hq, D] and k, packed or in pages."""
        q_len, longest_k = q.shape[0], min(self.longest_k(k), k_len)
        longest_q = min(self.max_seqlen_q, q_len)
        sequences = Sequences.of(self.cu_seqlens_q, self.cu_seqlens_k, q_len, k_len, longest_q, longest_k)
        q_shape, k_shape = torch.Size((1, q.shape[1], q_len, 0)), torch.Size((1, k.shape[-2], k_len, 0))
        return Visibility.of_shapes(q_shape, k_shape, q.device, sequences=sequences, **masks)


def packed_visibility(
    q: Tensor,
    k: Tensor,
    packing: Packing,
    causal: bool = False,
    window: tuple[int | None, int | None] | None = None,
    key_bias: Tensor | None = None,
    batch_invariant: bool | None = None,
) -> Visibility:
    """The keys visible to each row, of checked q [T_q, Hq, D] and k, packed or in pages; raises for masks not of these.

    key_bias   says how many keys there are, where they lie in pages
    """
    invariant = check_masks(causal, window, batch_invariant)
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
    q_len, k_len = q.shape[0], packing.keys(k, key_bias)
    for side, offsets, longest, length in (
        ("q", packing.cu_seqlens_q, packing.max_seqlen_q, q_len),
        ("k", packing.cu_seqlens_k, packing.max_seqlen_k, k_len),
    ):
        check_offset_values(f"cu_seqlens_{side}", offsets, length, f"T_{side}")
        _check_longest(side, offsets, longest)
    if packing.block_table is not None:
        _check_pages(packing, packing.block_table, k, window)
    return packing.visibility(q, k, k_len, causal=causal, window=window, invariant=invariant)


def _check_pages(packing: Packing, table: Tensor, k: Tensor, window: tuple[int | None, int | None] | None) -> None:
    """Check that sequences fit into the table, and the pages that rows read."""
    if not (values_are_read(packing.cu_seqlens_q) and values_are_read(packing.cu_seqlens_k)):
        return
    rows, keys = packing.cu_seqlens_q.diff().long(), packing.cu_seqlens_k.diff().long()
    page, capacity = k.shape[1], table.shape[1] * k.shape[1]
    if keys.numel() and int(keys.max()) > capacity:
        raise ValueError(
            f"cu_seqlens_k: expected at most max_pages * page = {capacity} keys a sequence, got {int(keys.max())}"
        )
    left, _ = window_sides(window)
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
        at = int((lengths < 0).int().argmax())
        raise ValueError(
            f"{name}: expected offsets that do not fall, got {int(offsets[at + 1])} after {int(offsets[at])}"
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
