"""Statistics of the keys in a paged KV cache, kept page by page and shared as its pages are."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..backends import kernels
from ..core.autograd import values_are_read
from ..core.cached_norms import CachedNorms, zeros
from ..core.hints import type_of
from ..core.norms import key_norms_of
from ..core.sequences import PackedAxis, PageTable, Slots
from ..ops import launches
from .checks import INTEGERS, check_count, check_tensor
from .key_statistics import described
from .layouts import SMALLEST_PAGE
from .sequence_checks import (
    check_block_table,
    check_new_keys,
    check_offset_values,
    check_offsets,
    check_page_numbers,
    check_record,
)

_OWNER = "this PagedKeyStatistics"


class PagedKeyStatistics(CachedNorms):
    """Norms of the keys in a paged KV cache, their sums and maxima, for `attention_varlen` and `attention_decode`.

    In the slot where page p holds the key j of a sequence, over the keys j' <= j of that sequence:

        norms[p, slot, h]            = ||k[j, h]||          [N, page, Hkv]   `dtype`
        norm_sums[p, slot, h]        = sum ||k[j', h]||     likewise         float64
        norm_square_sums[p, slot, h] = sum ||k[j', h]||^2   likewise         float64
        norm_maxima[p, slot, h]      = max ||k[j', h]||     likewise         `dtype`

    An entry depends on its key and the keys before it alone: sequences that share the pages of a common prefix share
    these entries, and a row needs the one entry of its last key. A row of a window reads the norms inside it. Entries
    of slots that hold no key have no effect.

    Args:
        pages: N, the pages of the cache.
        page: Keys of a page, at least 16.
        kv_heads: Hkv.
        device: The cache's device; None is torch's default.
        dtype: float32, or float64 for a float64 cache.

    All buffers have fixed shapes and change in place, nothing waits for the device, and the work is O(new keys):
    `append` can be compiled, and captured in a CUDA graph after a call with the same shapes, which compiles its kernel.
    On a GPU values are not read: keys without a page are dropped. On a CPU they raise ValueError.

    Raises TypeError or ValueError for an invalid size or dtype.

    >>> import torch, tritonattn
    >>> statistics = tritonattn.PagedKeyStatistics(pages=4, page=16, kv_heads=2)
    >>> table = torch.tensor([[3, 0], [1, 2]], dtype=torch.int32)  # pages of 2 sequences
    >>> ends = torch.tensor([0, 2, 3], dtype=torch.int32)  # 2 and 1 new keys
    >>> statistics.append(torch.ones(3, 2, 4), ends, key_lengths=torch.tensor([2, 1]), block_table=table)
    >>> statistics.norm_sums[3, :2, 0].tolist()
    [2.0, 4.0]
    """

    def __init__(
        self,
        pages: int,
        page: int,
        kv_heads: int,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        for name, size, least in (("pages", pages, 0), ("page", page, SMALLEST_PAGE), ("kv_heads", kv_heads, 0)):
            check_count(name, size, least)
        self.pages, self._spare = pages, pages
        self._memory = zeros(((pages + 1, page, kv_heads),) * 4, dtype, device)

    @classmethod
    def inside(cls, memory: tuple[Tensor, ...], spare: int) -> PagedKeyStatistics:
        """The record in memory that somebody else owns: the four buffers in the order, shapes and dtypes above.

        memory   [N, page, Hkv] each, of any strides
        spare    a page that no sequence has: keys without a page may be entered there
        """
        record = cls.__new__(cls)
        record.pages, record._spare, record._memory = memory[0].shape[0], spare, memory
        return record

    @property
    def page(self) -> int:
        return self._memory[0].shape[1]

    @property
    def buffers(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        return self.norms, self.norm_sums, self.norm_square_sums, self.norm_maxima

    def __repr__(self) -> str:
        pages, page, kv_heads = self.norms.shape
        return described(self, f"{pages=}, {page=}, {kv_heads=}", self.norms)

    def _shown(self, x: Tensor) -> Tensor:
        return x[: self.pages]

    def find(self, key: Tensor, table: PageTable | None) -> Slots:
        assert table is not None
        return table.find(key, self.pages)

    def at(self, name: str, found: Slots) -> Tensor:
        return found.of(getattr(self, name)).movedim(-1, 1)

    def _put(self, found: Slots, entries: tuple[Tensor, ...]) -> None:
        page = torch.where(found.is_held, found.page, self._spare)
        for buffer, values in zip(self._memory, entries, strict=True):
            buffer[page, found.slot] = values.movedim(1, -1)

    @torch.no_grad()
    def append(self, k_new: Tensor, cu_seqlens: Tensor, *, key_lengths: Tensor, block_table: Tensor) -> None:
        """Enter the newest keys of every sequence, before the attention that attends to them.

        No older key is read. To take keys back, as those of rejected guesses, enter others in their slots.

        Args:
            k_new: [T, Hkv, D], packed as the rows of `attention_varlen`: the keys as they are written to the cache.
            cu_seqlens: int32 [B + 1]: 0, then where each sequence's new keys end, at most T. A sequence may have none.
            key_lengths: Integers [B], the keys of every sequence with the new ones, which are its last.
            block_table: int32 [B, max_pages]: key j of sequence b is in page block_table[b, j // page], at j % page.

        Raises:
            TypeError, ValueError: A type, dtype, shape or device; on a CPU also offsets that fall or pass T,
                key_lengths outside [new keys, max_pages * page], and pages outside [0, N).
            RuntimeError: In a CUDA graph's capture, a kernel that is not compiled yet: append the same shapes before.
        """
        self._check(k_new, cu_seqlens, key_lengths, block_table)
        self.enter(k_new, cu_seqlens, key_lengths, block_table)

    @torch.no_grad()
    def enter(
        self, k_new: Tensor, cu_seqlens: Tensor, key_lengths: Tensor, block_table: Tensor, passes: int = 1
    ) -> None:
        """`append` of checked arguments. A sequence that goes on from keys which another enters takes a pass after."""
        if k_new.numel() == 0 or block_table.numel() == 0:
            return
        given = (k_new, cu_seqlens, key_lengths, block_table)
        if self.norms.dtype == torch.float32 and launches(k_new[None], *given[1:], self.norms):
            kernels().append_to_pages(*given, self.buffers, passes)
            return
        for _ in range(passes):
            self._append(*given)

    def _append(self, k_new: Tensor, cu_seqlens: Tensor, key_lengths: Tensor, block_table: Tensor) -> None:
        """`append` by operators of torch."""
        total = k_new.shape[0]
        longest = int(cu_seqlens.diff().max()) if values_are_read(cu_seqlens) else total
        new = PackedAxis.of(cu_seqlens, longest, total)
        first, order = (key_lengths.long() - new.counts)[:, None], torch.arange(longest, device=k_new.device)
        table = PageTable(block_table, self.page)
        found = self.find(torch.where(order < new.counts[:, None], first + order, -1), table)
        norms = new.unpacked(key_norms_of(k_new.transpose(0, 1)[None], invariant=True))  # as KeyStatistics does
        self._extend(torch.where(found.is_held[:, None], norms, 0), found, self.find(first - 1, table))

    def _check(self, k_new: Any, cu_seqlens: Any, key_lengths: Any, block_table: Any) -> None:
        check_new_keys(k_new, "[T, Hkv, D]", (None, self.norms.shape[2]), self.norms, _OWNER)
        check_offsets("cu_seqlens", cu_seqlens, self.norms, _OWNER)
        sequences = cu_seqlens.shape[0] - 1
        check_tensor("key_lengths", key_lengths, "[B]", INTEGERS, self.norms, _OWNER, (sequences,))
        check_block_table(block_table, sequences, self.norms, _OWNER)
        check_offset_values("cu_seqlens", cu_seqlens, k_new.shape[0], "T")
        if not values_are_read(cu_seqlens, key_lengths):
            return
        new, end, capacity = cu_seqlens.diff(), key_lengths.long(), block_table.shape[1] * self.page
        wrong = (end < new) | (end > capacity)
        if wrong.any():
            at = int(wrong.nonzero()[0])
            raise ValueError(
                f"key_lengths: expected values from the {int(new[at])} new keys of sequence {at} to block_table's"
                f" max_pages * page = {capacity}, got {int(end[at])}"
            )
        first = torch.where(new > 0, (end - new - 1).clamp(min=0), end)
        check_page_numbers(block_table, self.page, self.pages, first, end, "key_lengths")


def check_paged_statistics(statistics: Any, q: Tensor, pages: Tensor, block_table: Tensor | None) -> None:
    """Raise unless this is a record of the keys in `pages`, [N, page, Hkv, D]."""
    if not isinstance(statistics, PagedKeyStatistics):
        raise TypeError(f"statistics: expected a PagedKeyStatistics, got {type_of(statistics)}")
    if block_table is None:
        raise ValueError("statistics: expected a block_table with a PagedKeyStatistics, got None")
    check_record(statistics.norms, tuple(pages.shape[:3]), "[N, page, Hkv]", q)
