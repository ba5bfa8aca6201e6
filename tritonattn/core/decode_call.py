"""One decode call as plain tensors: a few new queries against a KV cache, contiguous or in pages."""

from __future__ import annotations

from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor

from .visibility import Visibility


def of_padded(sizes, device, key_lengths, row_counts=None, *, left=None, invariant=False) -> Visibility:
    return _CacheVisibility(
        *sizes, device, left=left, key_lengths=key_lengths, invariant=invariant, query_lengths=row_counts
    )


@dataclass(frozen=True, eq=False)
class _CacheVisibility(Visibility):
    """Visibility of rows at the end of their sequence's key_lengths, not of the capacity."""

    query_lengths: Tensor | None = None

    @property
    def is_bottom_right(self) -> bool:
        return False

    @property
    def begins_at_first(self) -> bool:
        return self.left is None and self.query_lengths is None

    def counts(self) -> Tensor:
        return self._ends()[:, None].double() if self.begins_at_first else super().counts()

    def _ends(self) -> Tensor:
        """One past the last key that each row sees: int64 [B, Sq]."""
        lengths = self._key_lengths()
        if self.q_len == 1 and self.query_lengths is None:
            return lengths
        order = torch.arange(self.q_len, device=self.device)
        return torch.minimum(lengths + (order + 1 - self._rows()), lengths).clamp(min=0)

    def _ranges(self) -> tuple[Tensor, Tensor]:
        hi = self._ends()
        lo = torch.zeros_like(hi) if self.left is None else (hi - (self.left + 1)).clamp(min=0)
        if self.query_lengths is None:
            return lo, hi
        is_row = torch.arange(self.q_len, device=self.device) < self._rows()
        return torch.where(is_row, lo, hi), hi

    def _key_lengths(self) -> Tensor:
        return cast(Tensor, self.key_lengths).long().clamp(0, self.k_len)[:, None]  # [B, 1]

    def _rows(self) -> Tensor | int:
        return self.q_len if self.query_lengths is None else self.query_lengths.long().clamp(0, self.q_len)[:, None]
