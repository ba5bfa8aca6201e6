"""Statistics of the keys in a KV cache, kept with it, for scalings that depend on key norms."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from ..backends import kernels
from ..core.autograd import values_are_read
from ..core.cached_norms import TOTALS, CachedNorms, zeros
from ..core.hints import type_of
from ..core.norms import key_norms_of
from ..core.sequences import PageTable
from ..ops import launches
from .checks import (
    INTEGERS,
    check_count,
    check_tensor,
)
from .sequence_checks import check_new_keys, check_values

_OWNER = "this KeyStatistics"


def described(cache: Any, sizes: str, buffer: Tensor, counts: Tensor | None = None) -> str:
    """The repr of a cache, with the keys that it holds where the host may read them."""
    held = f", counts={counts.tolist()}" if counts is not None and values_are_read(counts) else ""
    return f"{type(cache).__name__}({sizes}, device={buffer.device}, dtype={buffer.dtype}{held})"


class KeyStatistics(CachedNorms):
    """Norms of the keys in a KV cache, with their sums and maxima, for `attention_decode(..., statistics=)`.

    With c[b] keys held by batch entry b, over the keys j' < j, for j = 0 .. c[b]:

        norms[b, h, j]            = ||k[b, h, j]||                   [B, Hkv, capacity]      `dtype`
        norm_sums[b, h, j]        = sum ||k[b, h, j']||              [B, Hkv, capacity + 1]  float64
        norm_square_sums[b, h, j] = sum ||k[b, h, j']||^2            [B, Hkv, capacity + 1]  float64
        norm_maxima[b, h, j]      = max ||k[b, h, j']||, 0 at j = 0  [B, Hkv, capacity + 1]  `dtype`
        counts[b]                 = c[b]                             [B]                     int64

    Entries after c[b] have no effect. Sums and maxima over a window come from its norms. Each cache needs a record of
    its own: a call cannot tell keys of another layer from those of a longer sequence.

    Args:
        batch: B, the sequences of the cache.
        kv_heads: Hkv.
        capacity: The keys that a sequence can hold: Sk of a contiguous cache, max_pages * page of a paged one.
        device: The cache's device; None is torch's default.
        dtype: float32, or float64 for a float64 cache.

    All buffers have fixed shapes and change in place, nothing waits for the device, and the work is O(new keys):
    every method can be compiled, and captured in a CUDA graph (`append` after a call with the same shapes, which
    compiles its kernel). On a GPU values are not read: keys past the capacity are dropped. On a CPU they raise
    ValueError.

    One `append` of many keys and many of a few give the same bits in fp32, except in code compiled for a GPU.

    Raises TypeError or ValueError for an invalid size or dtype.

    >>> import torch, tritonattn
    >>> statistics = tritonattn.KeyStatistics(batch=1, kv_heads=2, capacity=16)
    >>> statistics.append(torch.ones(1, 2, 3, 4))
    >>> statistics.norm_sums[0, 0, :4].tolist()
    [0.0, 2.0, 4.0, 6.0]
    """

    def __init__(
        self,
        batch: int,
        kv_heads: int,
        capacity: int,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        for name, size in (("batch", batch), ("kv_heads", kv_heads), ("capacity", capacity)):
            check_count(name, size)
        self.capacity = capacity
        self.counts = torch.zeros(batch, dtype=torch.int64, device=device)
        # Each has one more entry at its end, for keys that are dropped.
        norms, prefix = (batch, kv_heads, capacity + 1), (batch, kv_heads, capacity + 2)
        self._memory = zeros((norms, prefix, prefix, prefix), dtype, device)

    def __repr__(self) -> str:
        batch, kv_heads, capacity = self.norms.shape
        return described(self, f"{batch=}, {kv_heads=}, {capacity=}", self.norms, self.counts)

    def _shown(self, x: Tensor) -> Tensor:
        return x[..., :-1]

    def find(self, key: Tensor, table: PageTable | None) -> Tensor:
        return key

    def at(self, name: str, found: Tensor) -> Tensor:
        buffer = getattr(self, name)
        position = (found + 1 if name in TOTALS else found.clamp(min=0))[:, None].expand(-1, buffer.shape[1], -1)
        entries = buffer.gather(2, position)
        return entries if name in TOTALS else torch.where(found[:, None] >= 0, entries, 0)

    def _put(self, found: Tensor, entries: tuple[Tensor, ...]) -> None:
        position = torch.where(found >= 0, found, self.capacity)[:, None].expand_as(entries[0])
        for buffer, values, shift in zip(self._memory, entries, (0, 1, 1, 1), strict=True):
            buffer.scatter_(2, position + shift, values)

    def along_keys(self, k_len: int, table: PageTable | None) -> Tensor:
        return self.norms

    @torch.no_grad()
    def append(self, k_new: Tensor, counts: Tensor | None = None) -> None:
        """Append the next keys of every sequence, before the `attention_decode` that attends to them.

        Append each key once. A second `append` of the same keys takes them for later ones: nothing here knows the
        cache, and factors of later steps are wrong. `counts` tells how many keys the record holds.

        Args:
            k_new: [B, Hkv, n, D], as they are written to the cache.
            counts: Integers [B]: how many of the n are keys of sequence b, the first ones; None is all. The others
                may hold anything.

        Raises:
            TypeError, ValueError: A type, dtype, shape or device; on a CPU also counts outside [0, n] and keys past
                the capacity.
            RuntimeError: In a CUDA graph's capture, a kernel that is not compiled yet: append the same shapes before.
        """
        batch, kv_heads, _ = self.norms.shape
        check_new_keys(k_new, "[B, Hkv, n, D]", (batch, kv_heads, None), self.counts, _OWNER)
        new = k_new.shape[2]
        if counts is not None:
            self._check_per_sequence("counts", counts, new)
        self._check_room(new if counts is None else counts)
        if new == 0:
            return
        fits = self.norms.dtype == torch.float32 and k_new.numel() > 0
        if fits and launches(k_new, counts, self.counts):
            kernels().append_keys(k_new, counts, self._buffers())
            return
        order = torch.arange(new, device=k_new.device)
        position = self.counts[:, None] + order  # [B, n]
        kept = position < self.capacity
        if counts is not None:
            kept = kept & (order < counts[:, None])
        norms = key_norms_of(k_new, kept[:, None], invariant=True)  # whatever the call that reads them
        self._extend(norms, torch.where(kept, position, -1), self.counts[:, None] - 1)
        self.counts += kept.sum(-1)

    @torch.no_grad()
    def reset(self) -> None:
        """Forget all keys. To forget those of some sequences, `truncate` them to 0."""
        self.counts.zero_()

    @torch.no_grad()
    def reorder(self, index: Tensor) -> None:
        """Let sequence b continue from the keys of sequence index[b], as beam search does.

        Args:
            index: Integers [B] in [0, B), in any order and number.

        Raises:
            TypeError, ValueError: A type, dtype, shape or device; on a CPU also values.
        """
        self._check_per_sequence("index", index, len(self.counts) - 1)
        for buffer, chosen in self._chosen(index):
            buffer.copy_(chosen)

    @torch.no_grad()
    def truncate(self, lengths: Tensor | int) -> None:
        """Keep the first keys of every sequence: min(c[b], lengths[b]), as when guessed tokens are rejected.

        Args:
            lengths: Integers [B] in [0, capacity], or one int.

        Raises:
            TypeError, ValueError: A type, dtype, shape or device; an int, or on a CPU a tensor, outside.
        """
        if isinstance(lengths, Tensor):
            self._check_per_sequence("lengths", lengths, self.capacity)
            self.counts.copy_(torch.minimum(self.counts, lengths.long().clamp(min=0)))
        elif isinstance(lengths, bool) or not isinstance(lengths, int):
            raise TypeError(f"lengths: expected an integer tensor [B] or an int, got {type_of(lengths)}")
        elif not 0 <= lengths <= self.capacity:
            raise ValueError(f"lengths: expected a value in [0, {self.capacity}], got {lengths}")
        else:
            self.counts.clamp_(max=lengths)

    @torch.no_grad()
    def select(self, index: Tensor) -> KeyStatistics:
        """Statistics whose sequence b is this one's sequence index[b]: a copy, of as many sequences as index names.

        Args:
            index: Integers [n] in [0, B), in any order and number.

        Raises:
            TypeError, ValueError: A type, dtype, shape or device; on a CPU also values.
        """
        self._check_per_sequence("index", index, len(self.counts) - 1, any_number=True)
        other = self._like(len(index), self.capacity)
        for buffer, (_, chosen) in zip(other._buffers(), self._chosen(index), strict=True):
            buffer.copy_(chosen)
        return other

    @torch.no_grad()
    def with_capacity(self, capacity: int) -> KeyStatistics:
        """A copy with room for more keys, for a cache that has grown.

        Raises:
            TypeError, ValueError: A capacity that is not an int, or is below this one.
        """
        check_count("capacity", capacity, self.capacity)
        other = self._like(len(self.counts), capacity)
        other.counts.copy_(self.counts)
        for buffer, held in zip(other._memory, self._memory, strict=True):
            buffer[..., : held.shape[-1] - 1].copy_(held[..., :-1])
        return other

    @torch.no_grad()
    def last(self, keys: int, capacity: int) -> KeyStatistics:
        """A copy that holds the last keys of every sequence, for a cache that forgets the others.

        Args:
            keys: How many; a sequence that holds fewer keeps all.
            capacity: The copy's capacity, at least keys.

        Raises:
            TypeError, ValueError: An argument that is not an int; less than 0 keys, or more than the copy can hold.
        """
        for name, size in (("keys", keys), ("capacity", capacity)):
            check_count(name, size)
        if keys > capacity:
            raise ValueError(f"keys: expected a value in [0, {capacity}], got {keys}")
        other = self._like(len(self.counts), capacity)
        held = self.counts.clamp(max=keys)
        order = torch.arange(keys, device=held.device)
        position = ((self.counts - held)[:, None] + order).clamp(max=self.capacity)
        norms = self._memory[0].gather(2, position[:, None].expand(-1, self.norms.shape[1], -1))
        kept = order < held[:, None]
        if keys:
            norms, order = torch.where(kept[:, None], norms, 0), torch.where(kept, order, -1)
            other._extend(norms, order, other.counts[:, None] - 1)
        other.counts.copy_(held)
        return other

    def _like(self, batch: int, capacity: int) -> KeyStatistics:
        norms = self.norms
        return KeyStatistics(batch, norms.shape[1], capacity, device=norms.device, dtype=norms.dtype)

    def _buffers(self) -> tuple[Tensor, ...]:
        return self.counts, *self._memory

    def _chosen(self, index: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        """Each of `_buffers`, with its sequences of these numbers."""
        index = index.long().clamp(0, max(len(self.counts) - 1, 0))
        return ((buffer, buffer.index_select(0, index)) for buffer in self._buffers())

    def _check_room(self, new: Tensor | int) -> None:
        if not values_are_read(self.counts):
            return
        needed = int((self.counts + new).max())
        if needed > self.capacity:
            raise ValueError(f"k_new: expected at most capacity = {self.capacity} keys, got {needed} with those held")

    def _check_per_sequence(self, name: str, x: Any, highest: int, any_number: bool = False) -> None:
        axes, size = ("[n]", None) if any_number else ("[B]", len(self.counts))
        check_tensor(name, x, axes, INTEGERS, self.counts, _OWNER, (size,))
        check_values(name, x, highest, "")
