"""The statistics that are kept beside a KV cache, by the places of keys along the axis of a call."""

from __future__ import annotations

import torch
from torch import Tensor

from ..core.pages import PageTable
from ..core.sequences import Sequences
from ..core.visibility import Visibility
from .cached_statistics import KeyRecord
from .key_statistics import KeyStatistics
from .paged_statistics import PagedKeyStatistics


def record_of(
    statistics: KeyStatistics | PagedKeyStatistics | None,
    block_table: Tensor | None,
    sequences: Sequences | None = None,
) -> KeyRecord | None:
    """The record of checked statistics."""
    if isinstance(statistics, KeyStatistics):
        return ContiguousRecord(statistics)
    if statistics is None or block_table is None:
        return None
    return PagedRecord(statistics, PageTable(block_table, statistics.page, sequences))


class ContiguousRecord:
    """The keys of a `KeyStatistics`."""

    def __init__(self, record: KeyStatistics) -> None:
        self._record = record
        self.dtype = record.norms.dtype

    def norms(self, k_len: int) -> Tensor:
        return self._record.norms

    def norms_at(self, key: Tensor, wanted: Tensor) -> Tensor:
        norms = self._record.norms
        place = torch.where(wanted, key, 0)[:, None].expand(-1, norms.shape[1], -1)
        return torch.where(wanted[:, None], norms.gather(2, place), 0)

    def of_rows(self, name: str, visibility: Visibility) -> Tensor:
        prefix, end = getattr(self._record, name), _ends(visibility)
        return prefix.gather(2, end[:, None].expand(-1, prefix.shape[1], -1))


class PagedRecord:
    """The keys of a `PagedKeyStatistics` that a table names."""

    def __init__(self, record: PagedKeyStatistics, table: PageTable) -> None:
        self._record = record
        self._table = table
        self.dtype = record.norms.dtype

    def norms(self, k_len: int) -> Tensor:
        key = torch.arange(k_len, device=self._record.norms.device)[None]
        return self.norms_at(key, torch.ones_like(key, dtype=torch.bool))

    def norms_at(self, key: Tensor, wanted: Tensor) -> Tensor:
        return self._table.gather(self._record.norms, key, wanted).movedim(-1, 1)

    def of_rows(self, name: str, visibility: Visibility) -> Tensor:
        entries = getattr(self._record, name)
        found = visibility.once("last keys", lambda: self._table.find(_ends(visibility) - 1, entries.shape[0]))
        return found.of(entries).movedim(-1, 1)


def _ends(visibility: Visibility) -> Tensor:
    """One past the last key of each row, 0 for a row without keys: int64 [B, Sq]."""
    lo, hi = visibility.ranges()
    return hi if visibility.begins_at_first else torch.where(hi > lo, hi, 0)
