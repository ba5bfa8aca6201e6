"""Sequences of different lengths, packed one after another along one axis."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Sequences:
    """Where the sequences of a packed batch lie among T_q rows and T_k keys.

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
        sequence = torch.searchsorted(q_starts[1:], row, right=True)  # N for a row of no sequence
        following = (sequence + 1).clamp(max=q_starts.shape[0] - 1)
        first, last = k_starts[sequence], k_starts[following]
        return first[None], last[None], (row + last - q_starts[following])[None]

    def position_of_keys(self, key: Tensor) -> tuple[Tensor, Tensor]:
        """The sequence of each key of the packed axis, N for none, and the key's number within it: int64, like key."""
        starts = self.k_starts.long()
        sequence = torch.searchsorted(starts[1:], key, right=True)
        return sequence, key - starts[sequence]


def _in_order(offsets: Tensor, length: int) -> Tensor:
    ends = offsets[1:].clamp(0, length)
    if ends.shape[0] > 1:
        ends = ends.cummax(0).values
    return torch.nn.functional.pad(ends, (1, 0))
