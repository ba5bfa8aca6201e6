"""Keys that lie in pages of any order: which page, and which slot of it, holds a key."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from .sequences import Sequences


class Found(NamedTuple):
    """Pages and slots of keys, int64 [N or 1, n], 0 for keys that lie nowhere; is_held: bool, the others."""

    page: Tensor
    slot: Tensor
    is_held: Tensor

    def of(self, x: Tensor) -> Tensor:
        """Their entries of x [pages, size, ...]: [N or 1, n, ...], 0 for keys that lie nowhere."""
        if x.shape[0] == 0:
            return x.new_zeros(*self.is_held.shape, *x.shape[2:])
        return torch.where(self.is_held.view(*self.is_held.shape, *[1] * (x.dim() - 2)), x[self.page, self.slot], 0)


@dataclass(frozen=True, eq=False)
class PageTable:
    """Key j of sequence n lies in page numbers[n, j // size], at j % size.

    numbers     int32 [N, max_pages]; a key whose number is outside of the pages that exist lies nowhere
    size        keys of a page
    sequences   keys are numbered along the packed axis of these; None: each sequence numbers those it has
    """

    numbers: Tensor
    size: int
    sequences: Sequences | None = None

    def gather(self, x: Tensor, key: Tensor, wanted: Tensor) -> Tensor:
        """The entries of x [pages, size, ...] that belong to `key`, int64 [N or 1, n]: [N or 1, n, ...].

        Zeros where not wanted, bool broadcastable to key, and for keys that lie nowhere.
        """
        return self.find(torch.where(wanted, key, -1), x.shape[0]).of(x)

    def find(self, key: Tensor, pages: int) -> Found:
        """Where `key`, int64 [N or 1, n], lies in so many pages; a key below 0 lies nowhere."""
        if self.sequences is None:
            sequence = torch.arange(self.numbers.shape[0], device=key.device)[:, None]
        else:
            sequence, key = self.sequences.position_of_keys(key)
        page, slot, found = self.locate(sequence, key, pages)
        return Found(torch.where(found, page, 0), torch.where(found, slot, 0), found)

    def locate(self, sequence: Tensor, key: Tensor, pages: int) -> tuple[Tensor, Tensor, Tensor]:
        """Page and slot of the keys of sequences, by their number in the sequence, and whether one of `pages` holds it.

        All are int64 of the shape to which sequence and key broadcast.
        """
        count, longest = self.numbers.shape
        ordinal = key.div(self.size, rounding_mode="floor")
        found = (ordinal >= 0) & (ordinal < longest) & (sequence < count)
        if self.numbers.numel() == 0:
            return torch.zeros_like(ordinal), torch.zeros_like(ordinal), torch.zeros_like(found)
        page = self.numbers[sequence.clamp(max=count - 1), ordinal.clamp(0, longest - 1)].long()
        return page, key - ordinal * self.size, found & (page >= 0) & (page < pages)
