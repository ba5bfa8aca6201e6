"""Sequences of different lengths: packed one after another along one axis, padded, or with keys in pages."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from .autograd import Linear


@dataclass(frozen=True, eq=False)
class Sequences:
    """The sequences of a packed batch, as ranges of T_q rows and T_k keys.

    q_starts    int32 [N + 1], from 0 up to T_q, never falling: sequence n has the rows
                q_starts[n] <= i < q_starts[n + 1]
    k_starts    int32 [N + 1], likewise up to T_k: its keys
    longest_q   at least the rows of every sequence
    longest_k   at least the keys of every sequence

    Rows and keys after the last start belong to no sequence.
    """

    q_starts: Tensor
    k_starts: Tensor
    longest_q: int
    longest_k: int

    @classmethod
    def of(
        cls, q_offsets: Tensor, k_offsets: Tensor, q_len: int, k_len: int, longest_q: int, longest_k: int
    ) -> Sequences:
        """Build the record from unchecked offsets, clamped so that the starts are in order and inside."""
        q_starts = _in_order(q_offsets, q_len)
        k_starts = q_starts if k_offsets is q_offsets and k_len == q_len else _in_order(k_offsets, k_len)
        return cls(q_starts, k_starts, longest_q, longest_k)

    def keys_of_rows(self, q_len: int) -> tuple[Tensor, Tensor, Tensor]:
        """First key, one past the last, and the bottom-right aligned key of every row: int64 [1, T_q] each.

        A row of no sequence gets first = last.
        """
        row = torch.arange(q_len, device=self.q_starts.device)
        q_starts, k_starts = self.q_starts.long(), self.k_starts.long()
        sequence = self.sequence_of_rows(q_len)
        following = (sequence + 1).clamp(max=q_starts.shape[0] - 1)
        first, last = k_starts[sequence], k_starts[following]
        return first[None], last[None], (row + last - q_starts[following])[None]

    def sequence_of_rows(self, q_len: int) -> Tensor:
        """The sequence of each row of the packed axis, N for none: int64 [T_q]."""
        return _position(self.q_starts.long(), torch.arange(q_len, device=self.q_starts.device))[0]

    def position_of_keys(self, key: Tensor) -> tuple[Tensor, Tensor]:
        """The sequence of each key of the packed axis, N for none, and the key's number within it: int64, like key."""
        return _position(self.k_starts.long(), key)


def _in_order(offsets: Tensor, length: int) -> Tensor:
    ends = offsets[1:].clamp(0, length)
    if ends.shape[0] > 1:
        ends = ends.cummax(0).values
    return torch.nn.functional.pad(ends, (1, 0))


def _position(starts: Tensor, entry: Tensor) -> tuple[Tensor, Tensor]:
    sequence = torch.searchsorted(starts[1:], entry, right=True)
    return sequence, entry - starts[sequence]


@dataclass(frozen=True, eq=False)
class PackedAxis:
    """A packed axis of `total` entries, as a padded batch and back: sums must not run across sequences.

    starts    int64 [N + 1]: sequence n has the entries from starts[n] up to starts[n + 1]
    longest   at least the entries of every sequence
    """

    starts: Tensor
    longest: int
    total: int

    @classmethod
    def of(cls, offsets: Tensor, longest: int, total: int) -> PackedAxis:
        """Build it from unchecked offsets, as `Sequences.of`."""
        return cls(_in_order(offsets, total).long(), longest, total)

    @property
    def counts(self) -> Tensor:
        """Entries of each sequence: [N]."""
        return self.starts[1:] - self.starts[:-1]

    def unpacked(self, x: Tensor) -> Tensor:
        """The sequences of x [1, H, total] as [N, H, longest], 0 behind each sequence."""
        return _Unpack(self)(x)

    def packed(self, x: Tensor) -> Tensor:
        """The sequences of x [N, H, longest] as [1, H, total], 0 for entries of no sequence."""
        return _Pack(self)(x)

    def _unpack(self, x: Tensor) -> Tensor:
        if x.numel() == 0:
            return x.new_zeros(self.starts.shape[0] - 1, x.shape[1], self.longest)
        position = torch.arange(self.longest, device=x.device)
        index = (self.starts[:-1, None] + position).clamp(max=max(self.total - 1, 0))  # [N, longest]
        found = x[0][:, index].transpose(0, 1)
        return torch.where((position < self.counts[:, None])[:, None], found, 0)

    def _pack(self, x: Tensor) -> Tensor:
        if x.numel() == 0:
            return x.new_zeros(1, x.shape[1], self.total)
        sequence, position = _position(self.starts, torch.arange(self.total, device=x.device))
        found = x[sequence.clamp(max=x.shape[0] - 1), :, position.clamp(max=self.longest - 1)]  # [total, H]
        return torch.where(sequence < x.shape[0], found.mT, 0)[None]


@dataclass(eq=False)
class _Pack(Linear):
    axis: PackedAxis

    def there(self, x: Tensor) -> Tensor:
        return self.axis._pack(x)

    def back(self, x: Tensor) -> Tensor:
        return self.axis._unpack(x)


class _Unpack(_Pack):
    there, back = _Pack.back, _Pack.there


class Slots(NamedTuple):
    """Pages and slots of keys, int64 [N or 1, n], 0 for keys that lie nowhere; is_held: bool, False for these."""

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

    def find(self, key: Tensor, pages: int) -> Slots:
        """The page and slot of `key`, int64 [N or 1, n], in that many pages; a negative key has none."""
        count, longest = self.numbers.shape
        if self.sequences is None:
            sequence = torch.arange(count, device=key.device)[:, None]
        else:
            sequence, key = self.sequences.position_of_keys(key)
        ordinal = key.div(self.size, rounding_mode="floor")
        if self.numbers.numel() == 0:
            nowhere = torch.zeros_like(ordinal)
            return Slots(nowhere, nowhere, nowhere.bool())
        is_held = (ordinal >= 0) & (ordinal < longest) & (sequence < count)
        page = self.numbers[sequence.clamp(max=count - 1), ordinal.clamp(0, longest - 1)].long()
        is_held = is_held & (page >= 0) & (page < pages)
        return Slots(torch.where(is_held, page, 0), torch.where(is_held, key - ordinal * self.size, 0), is_held)
