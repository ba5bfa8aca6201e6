"""The keys that each query row attends to: one record for every mask.

Row i of batch entry b attends to the keys lo[b, i] <= j < hi[b, i]. Causal attention, windows, padding, packed
documents and caches filled in part are all such ranges, so counts are differences, and sums over visible keys are
differences of prefix sums. A dense bool mask is the fallback for holes; it is intersected with the ranges.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any, cast

import torch
from torch import Tensor

from . import ranges
from .autograd import Facts, facts_of, values_are_read
from .sequences import Sequences


@dataclass(eq=False)  # every call makes one, and frozen it takes three times as long
class Visibility:
    """The visible keys of every query row. Nothing changes it.

    sequences     row i attends to keys of its sequence of a packed batch alone; then B is 1
    left, right   i + Sk - Sq - left <= j <= i + Sk - Sq + right for row i; None is unlimited; causal is right = 0;
                  i, j, Sq and Sk are those of the row's sequence where there are sequences
    key_lengths   int [B]: j < key_lengths[b]
    key_ranges    int [B, Sq, 2]: key_ranges[b, i, 0] <= j < key_ranges[b, i, 1] for row i
    mask          bool, 4-D, each axis of [B, Hq, Sq, Sk] or 1: True is visible
    invariant     sums over visible keys do not depend on the batch, on padding and packing: `core.invariance`
    at_lengths    the last row of entry b stands at key_lengths[b] - 1, not at Sk - 1, and left and right count from
                  there
    row_counts    int [B], where at_lengths: rows of entry b, the first of Sq; the others attend to no key. None: Sq
    counted       `counts` are of the keys visible there; None: of those visible here

    Every part that is given narrows the rest. Values outside [0, Sk] are clamped, lo >= hi is a row without keys.
    """

    batch: int
    q_heads: int
    kv_heads: int
    q_len: int
    k_len: int
    device: torch.device
    left: int | None = None
    right: int | None = None
    key_lengths: Tensor | None = None
    key_ranges: Tensor | None = None
    mask: Tensor | None = None
    sequences: Sequences | None = None
    invariant: bool = False
    at_lengths: bool = False
    row_counts: Tensor | None = None
    counted: Visibility | None = None
    _kept: dict[Any, Any] = field(default_factory=dict, init=False, repr=False)

    def __post_init__(self) -> None:
        """depends_on_sizes_only: sizes, causal and window alone decide which keys are visible. Calls ask often."""
        only_sizes = self.key_lengths is None and self.key_ranges is None
        self.depends_on_sizes_only = only_sizes and self.mask is None and self.sequences is None

    @classmethod
    def of(cls, q: Tensor, k: Tensor, **masks: Any) -> Visibility:
        """`of_shapes` for q [B, Hq, Sq, D] and k [B, Hkv, Sk, D]."""
        return cls.of_shapes(q.shape, k.shape, q.device, **masks)

    @classmethod
    def of_shapes(
        cls,
        q_shape: torch.Size,
        k_shape: torch.Size,
        device: torch.device,
        *,
        causal: bool = False,
        window: tuple[int | None, int | None] | None = None,
        key_lengths: Tensor | None = None,
        key_ranges: Tensor | None = None,
        mask: Tensor | None = None,
        sequences: Sequences | None = None,
        invariant: bool = False,
    ) -> Visibility:
        """The record for q of [B, Hq, Sq, D] and k of [B, Hkv, Sk, D] from checked arguments of a public call."""
        left, right = (None, None) if window is None else ranges.window_sides(window)
        if causal:
            right = 0 if right is None else min(right, 0)
        if key_ranges is not None and key_ranges.dim() == 4:
            key_ranges = key_ranges.squeeze(1)
        batch, q_heads, q_len, _ = q_shape
        _, kv_heads, k_len, _ = k_shape
        if mask is not None:  # without query heads its axis of heads has no meaning
            mask = None if q_heads == 0 else mask[(None,) * (4 - mask.dim())]
        sizes = (batch, q_heads, kv_heads, q_len, k_len)
        return cls(*sizes, device, left, right, key_lengths, key_ranges, mask, sequences, invariant)

    @classmethod
    def of_padded(
        cls,
        sizes: tuple[int, int, int, int, int],
        device: torch.device,
        key_lengths: Tensor,
        row_counts: Tensor | None = None,
        *,
        left: int | None = None,
        right: int | None = 0,
        invariant: bool = False,
    ) -> Visibility:
        """A KV cache, or sequences as a padded batch, of (B, Hq, Hkv, Sq, Sk) rows and keys in memory.

        Entry b has the first key_lengths[b] keys and the first row_counts[b] rows, None: all. Row i stands at key
        i + key_lengths[b] - row_counts[b].
        """
        if row_counts is None and sizes[3] == 1 and left is None:  # a lone row at the last key attends to all
            right = None
        given = {"invariant": invariant, "at_lengths": True, "row_counts": row_counts}
        return cls(*sizes, device, left, right, key_lengths, **given)

    @classmethod
    def of_part(cls, whole: Visibility, first: int, k_len: int) -> Visibility:
        """The visibility of the k_len keys of `whole` from key `first` on, with the counts of all keys."""
        sizes = (whole.batch, whole.q_heads, whole.kv_heads, whole.q_len, k_len)
        bounds = cast(Tensor, whole.as_ranges().key_ranges)
        return cls(*sizes, whole.device, key_ranges=bounds - first, counted=whole)

    @property
    def rows(self) -> tuple[int, int, int]:
        """The shape of a number for each row, [B, Hq, Sq]."""
        return self.batch, self.q_heads, self.q_len

    @property
    def keys(self) -> tuple[int, int, int]:
        """The shape of a number for each key, [B, Hkv, Sk]."""
        return self.batch, self.kv_heads, self.k_len

    @property
    def tensors(self) -> tuple[Tensor | None, ...]:
        """The tensors that narrow the ranges, and the starts of sequences."""
        packed = self.sequences
        starts = (None, None) if packed is None else (packed.q_starts, packed.k_starts)
        return self.key_lengths, self.key_ranges, self.mask, *starts

    def without_tensors(self) -> Visibility:
        """The record of the rest, of which `with_tensors` makes the whole again."""
        return self.with_tensors(None, None, None, None, None)

    def with_tensors(self, key_lengths: Any, key_ranges: Any, mask: Any, q_starts: Any, k_starts: Any) -> Visibility:
        """The record with other `tensors`."""
        packed = self.sequences
        if packed is not None:
            packed = Sequences(q_starts, k_starts, packed.longest_q, packed.longest_k)
        return replace(self, key_lengths=key_lengths, key_ranges=key_ranges, mask=mask, sequences=packed)

    @property
    def is_full(self) -> bool:
        """True where sizes alone show that every row attends to every key: a lone causal query, a window of all.

        Lengths that a trace leaves free tell nothing: an answer would bind them.
        """
        if not self.depends_on_sizes_only:
            return False
        reaches_first = self.left is None or (isinstance(self.k_len, int) and self.left >= self.k_len - 1)
        return reaches_first and (self.right is None or (isinstance(self.q_len, int) and self.right >= self.q_len - 1))

    @property
    def attends_to_every_key(self) -> bool:
        """True where sizes alone show that each key has a row that attends to it: windows overlap or touch."""
        if not self.depends_on_sizes_only or self.q_len == 0:
            return False
        reaches_first = self.left is None or self.left >= self.k_len - self.q_len
        return reaches_first and (self.right is None or self.right >= 0)

    @property
    def is_causal(self) -> bool:
        """True where Sq <= Sk and row i attends to exactly the keys j <= i + Sk - Sq."""
        return self.left is None and self.right == 0 and self.q_len <= self.k_len and self.depends_on_sizes_only

    @property
    def is_square_causal(self) -> bool:
        """True where the visible keys are the lower triangle of a square, and nothing else."""
        return self.q_len == self.k_len and self.is_causal

    @property
    def begins_at_first(self) -> bool:
        """True where the range of every row begins at the first key."""
        return self.is_prefix_or_empty and self.row_counts is None

    @property
    def is_prefix_or_empty(self) -> bool:
        """True where the range of every row that attends to a key begins at the first one."""
        return self.left is None and self.key_ranges is None and self.sequences is None

    @property
    def every_row_attends(self) -> bool:
        """True where sizes, causal and window alone show that every row attends to a key."""
        return self.q_len <= self.k_len and self.k_len > 0 and self.depends_on_sizes_only

    @property
    def is_bottom_right(self) -> bool:
        """True where the last row stands at key Sk - 1, and the others before it: left and right count from there."""
        return self.sequences is None and not self.at_lengths

    @property
    def order(self) -> ranges.Order:
        """The order of the ranges, and of the keys that rows of a mask pick. Packed documents may be key_ranges.

        Where `invariant`, packed sequences are taken apart before, and no sum may begin again for padding alone.
        """
        is_packed = self.key_ranges is not None or self.sequences is not None
        return ranges.Order(self.key_ranges is None and self.mask is None, is_packed and not self.invariant)

    @property
    def per_query_head(self) -> bool:
        """True where the query heads of one key head may attend to different keys (a mask with a head axis)."""
        return self.mask is not None and self.mask.shape[1] > 1

    def ranges(self) -> tuple[Tensor, Tensor]:
        """lo and hi, int64, [B, Sq], or [1, Sq] where they are the same for all; 0 <= lo <= hi <= Sk. Read-only."""
        return self.shared("ranges", self._ranges)

    def once(self, key: Any, compute: Callable[[], Any]) -> Any:
        """compute(), which depends on this record and the key alone; kept for all calls that share the record."""
        if key not in self._kept:
            self._kept[key] = compute()
        return self._kept[key]

    def shared(self, key: str, compute: Callable[[], Any]) -> Any:
        """compute(), which depends on sizes, sides and lengths alone, and holds no tensor of theirs: `Facts`."""
        facts = self.once("facts", self._facts)
        return self.once(key, compute) if facts is None else facts.of(key, compute)

    def _facts(self) -> Facts | None:
        """The facts of this record's layout; None where lengths are not read, or pairs are given."""
        packed = self.sequences
        starts = (None, None) if packed is None else (packed.q_starts, packed.k_starts)
        lengths = self.key_lengths, self.row_counts, *starts
        is_given = not (self.key_ranges is None and self.mask is None and self.counted is None)
        if is_given or self.device.type != "cpu" or not values_are_read(*lengths):
            return None
        longest = None if packed is None else (packed.longest_q, packed.longest_k)
        sizes = self.batch, self.q_heads, self.kv_heads, self.q_len, self.k_len, longest
        ways = self.left, self.right, self.at_lengths, self.invariant
        return facts_of(sizes, ways, *[None if x is None else tuple(x.tolist()) for x in lengths])

    def _ranges(self) -> tuple[Tensor, Tensor]:
        lo, hi = self._lower(), self.ends()
        if lo is None:
            return torch.zeros((1, self.q_len), dtype=torch.int64, device=self.device), hi
        lo = lo.clamp(0, self.k_len)
        return lo, torch.maximum(hi, lo)

    def _lower(self) -> Tensor | None:
        """The first key of each row, not clamped; None is key 0."""
        lo, _, position = self.shared("rows", self._rows)
        if self.left is not None:
            lo = ranges.later(lo, position - self.left)
        return lo if self.key_ranges is None else ranges.later(lo, self.once("wide", self.key_ranges.long)[..., 0])

    def ends(self) -> Tensor:
        """One past the last key of each row, [B or 1, Sq], where it is no empty range that begins later; kept."""
        return self.shared("ends", self._upper)

    def _upper(self) -> Tensor:
        _, hi, position = self.shared("rows", self._rows)
        if self.right is not None:
            hi = ranges.earlier(hi, position + (self.right + 1))
        if self.key_ranges is not None:
            hi = ranges.earlier(hi, self.once("wide", self.key_ranges.long)[..., 1])
        if self.key_lengths is not None and not self.at_lengths:
            hi = ranges.earlier(hi, self.key_lengths.long()[:, None])
        if hi is None:
            return torch.full((1, self.q_len), self.k_len, dtype=torch.int64, device=self.device)
        return hi.clamp(0, self.k_len).expand(-1, self.q_len)

    def _rows(self) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """First key and one past the last of each row's sequence, and the row's position: int64 [B or 1, Sq or 1].

        None stands for 0, for Sk, and for a position that no side of a window needs. A row of no sequence gets first =
        last.
        """
        if self.sequences is not None:
            return self.sequences.keys_of_rows(self.q_len)
        has_sides = not (self.left is None and self.right is None)
        if self.at_lengths and self.row_counts is None and not has_sides:
            is_shared = self.once("facts", self._facts) is not None  # then not the user's tensor
            return None, cast(Tensor, self.key_lengths).to(torch.int64, copy=is_shared)[:, None], None
        if self.at_lengths:
            row = torch.arange(self.q_len, device=self.device)
            last = cast(Tensor, self.key_lengths).long().clamp(0, self.k_len)[:, None]
            if self.row_counts is None:
                return None, last, row + (last - self.q_len)
            rows = self.row_counts.long().clamp(0, self.q_len)[:, None]
            return torch.where(row < rows, 0, last), last, torch.minimum(row, rows - 1) + (last - rows)
        if not has_sides:
            return None, None, None
        return None, None, torch.arange(self.k_len - self.q_len, self.k_len, device=self.device)[None]

    def positions(self) -> Tensor:
        """The key at which each row stands, from which left and right count, on its axis: int64 [B or 1, Sq]."""
        _, last, position = self.shared("rows", self._rows)
        if position is not None:
            return position
        first = self.k_len - self.q_len
        if self.at_lengths:
            first = last.clamp(0, self.k_len) - self.q_len
        return (torch.arange(self.q_len, device=self.device) + first).view(-1, self.q_len)

    def sequence_begins(self) -> Tensor | int:
        """The first key of each row's sequence of a packed batch, int64 [Sq], or 0."""
        return 0 if self.sequences is None else self.shared("rows", self._rows)[0][0]

    def as_ranges(self) -> Visibility:
        """The same visible keys as key_ranges [B, Sq, 2], and the mask."""
        bounds = torch.stack([bound.expand(self.batch, -1) for bound in self.ranges()], dim=-1)
        rest = {"left": None, "right": None, "key_lengths": None, "sequences": None, "row_counts": None}
        return replace(self, **rest, key_ranges=bounds, at_lengths=False)

    def counts(self) -> Tensor:
        """n, the number of visible keys: fp64 [B or 1, 1 or Hq, Sq]."""
        if self.counted is not None:
            return self.counted.counts()
        if self.is_causal:
            first = self.k_len - self.q_len + 1
            return torch.arange(first, self.k_len + 1, dtype=torch.float64, device=self.device).view(1, 1, -1)
        if self.left is None and self.is_full:
            return torch.full((1, 1, self.q_len), self.k_len, dtype=torch.float64, device=self.device)
        if self.mask is not None:
            return torch.cat([tile.sum(-1) for _, tile in self._mask_tiles(self.mask)], dim=-1).double()
        if self.begins_at_first:
            return self.ends()[:, None].double()
        lo, hi = self.ranges()
        return (hi - lo)[:, None].double()

    def first_keys(self) -> Tensor | None:
        """The first key of each entry's sequence, int64 [B], where the order of sums follows it; None for key 0.

        It is the smallest lower bound that key_ranges give a row that attends to a key, as with padding on the left.
        """
        if not self.invariant or self.key_ranges is None or self.mask is not None or self.q_len == 0:
            return None
        lo, hi = self.ranges()
        given = self.key_ranges[..., 0].long().clamp(0, self.k_len)
        return torch.where(lo < hi, given, self.k_len).amin(-1)

    def from_keys(self, first: Tensor) -> Visibility:
        """The same visible keys, counted from key first[b], int64 [B], of each entry; keys before it come last."""
        counted = torch.stack([(bound - first[:, None]).clamp(min=0) for bound in self.ranges()], dim=-1)
        return replace(self, left=None, right=None, key_lengths=None, key_ranges=counted)

    def last_keys(self) -> Tensor:
        """The last key of each row without a mask, -1 for a row without keys: int64 [B or 1, Sq]."""
        if self.begins_at_first:
            return self.ends() - 1
        lo, hi = self.ranges()
        return torch.where(hi > lo, hi, 0) - 1

    def attending_rows(self) -> Tensor:
        """Rows that attend to at least one key: bool [B or 1, 1 or Hq, Sq]. Read-only."""
        return self.shared("attending rows", self._attending_rows)

    def _attending_rows(self) -> Tensor:
        if self.mask is not None:
            return self.counts() > 0
        lo, hi = self.ranges()
        return (hi > lo)[:, None]

    def seen_keys(self) -> Tensor:
        """Keys that at least one row attends to: bool [B or 1, 1 or Hkv, Sk]. Read-only."""
        return self.shared("seen keys", self._seen_keys)

    def _seen_keys(self) -> Tensor:
        if self.begins_at_first and self.mask is None and self.q_len > 0:
            return (torch.arange(self.k_len, device=self.device) < self.ends().amax(-1, keepdim=True))[:, None]
        if self.mask is None:
            return (ranges.rows_of_keys(*self.ranges(), self.k_len, self.key_ranges is None) > 0)[:, None]
        seen = torch.zeros((), dtype=torch.bool, device=self.device)
        for _, tile in self._mask_tiles(self.mask):
            seen = seen | tile.any(-2)
        if self.per_query_head:
            seen = seen.unflatten(1, (self.kv_heads, -1)).any(2)
        return seen.expand(-1, -1, self.k_len)

    def repeated(self, x: Tensor) -> Tensor:
        """x [..., Hkv, Sq] for every query head, [..., Hq, Sq]; where `invariant`, heads' gradients add up in order."""
        group = self.q_heads // x.shape[-2]
        if not self.invariant:
            return x.repeat_interleave(group, dim=-2)
        return torch.stack([x] * group, dim=-2).flatten(-3, -2)

    def dense(self) -> Tensor:
        """The visible pairs, bool [B or 1, 1 or Hq, Sq, Sk]: O(Sq Sk), for the reference."""
        return ranges.pairs(*self.ranges(), self.mask, self.k_len)

    def _mask_tiles(self, mask: Tensor) -> Iterator[tuple[slice, Tensor]]:
        return ranges.row_tiles(*self.ranges(), mask, self.k_len, self.batch * mask.shape[1])
