"""Cut the visible pairs of a call into rectangles, triangles and the rest: parts that PyTorch's kernel takes."""

from __future__ import annotations

import functools
from dataclasses import dataclass, replace
from itertools import groupby, pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from ...core.visibility import Visibility
from .torch_kernel import VECTOR

# Rows of a part whose pairs are neither a rectangle nor a triangle: its mask has this many at most, and _PAIRS pairs
# unless that leaves fewer than _LEAST_ROWS.
_ROWS = 256
_LEAST_ROWS = 64
_PAIRS = 1 << 22
# Pairs that the kernel computes in the time that a call of it, and what leads to it, takes at the least.
_CALL = 30_000
# And in the time in which it reads a key and its value, which for few rows is most of it.
_READ = 10
# Shorter rectangles and triangles join their neighbours under one mask: a call of the kernel costs as much.
_SHORTEST = 24
# Rows from which on a rectangle and a triangle behind it cost less than their masks.
_SPLIT = 128
# Masks of few pairs that are kept, of 1 MB at most.
_MASKS = 8
_PAIRS_OF_KEPT = 1 << 18


@dataclass(frozen=True, eq=False)
class Part:
    """Rows of some batch entries, and the keys outside which they attend to none.

    form     "full": each row attends to all the keys. "causal": row i of the part to its first i + 1 keys, and there
             are as many as rows. "ranges": a mask has to tell which, the same for all of `count`.
    count    parts of one shape and form, of one entry, the next one `step` rows and `key_step` keys further
    joins    its rows attend to the keys of a part before it too
    """

    batch: slice
    rows: slice
    keys: slice
    form: str
    count: int = 1
    step: int = 0
    key_step: int = 0
    joins: bool = False

    @property
    def height(self) -> int:
        """Its number of rows."""
        return self.rows.stop - self.rows.start

    @property
    def width(self) -> int:
        """Its number of keys."""
        return self.keys.stop - self.keys.start

    @property
    def entries(self) -> int:
        """Its number of batch entries for the kernel: those of the call, or `count`."""
        return self.count * (self.batch.stop - self.batch.start)

    @property
    def pairs(self) -> float:
        """The pairs of a head that the kernel computes."""
        return self.entries * self.height * self.width * (0.5 if self.form == "causal" else 1)

    def of_rows(self, x: Tensor) -> Tensor:
        """Its rows of x [B, Hq, Sq, ...], as a view [N, Hq, rows, ...]; N is batch entries, or `count`."""
        return self._of(x, self.rows, self.step)

    def of_keys(self, x: Tensor) -> Tensor:
        """Its keys of x [B, Hkv, Sk, ...], likewise."""
        return self._of(x, self.keys, self.key_step)

    def joined(self, x: Tensor) -> Tensor:
        """x [N, H, n, ...] of one part that holds all rows, or all keys once, as a view [B, H, S, ...]."""
        return x if self.count == 1 else x.transpose(0, 1).flatten(1, 2)[None]

    def add_to_keys(self, whole: Tensor, found: Tensor) -> None:
        """Add what was found for its keys, [N, Hkv, keys, C], to whole [B, Hkv, Sk, C]: parts may share keys."""
        if self.count == 1 or self.key_step >= self.width:
            self.of_keys(whole).add_(found)
            return
        pieces = unstacked(self)
        for piece, one in zip(pieces, found.split(found.shape[0] // len(pieces)), strict=True):
            piece.of_keys(whole).add_(one)

    def _of(self, x: Tensor, entries: slice, step: int) -> Tensor:
        size = entries.stop - entries.start
        if self.count == 1:
            is_whole = x.shape[0] == self.batch.stop - self.batch.start and x.shape[2] == size
            return x if is_whole else x[self.batch, :, entries]
        whole = x[self.batch.start, :, entries.start : entries.stop + (self.count - 1) * step]
        windows = whole.unfold(1, size, step)  # [H, count, ..., size]
        return windows.movedim(-1, 2).transpose(0, 1)


class _Run(NamedTuple):
    """Rows from `start` to `stop` whose first key and end move by `steps` keys per row, from `first` and `end`."""

    start: int
    stop: int
    first: int
    end: int
    steps: tuple[int, int]

    @property
    def form(self) -> str:
        is_empty = self.end <= self.first
        if self.stop - self.start == 1 or self.steps[0] == self.steps[1]:
            if is_empty:
                return ""
            if self.steps == (0, 0):
                return "full"
        return "causal" if self.steps == (0, 1) and self.end - self.first == 1 else "ranges"

    @property
    def keys(self) -> tuple[int, int]:
        """The first key of all ranges, and their end."""
        last = self.stop - self.start - 1
        ends = self.end, self.end + last * self.steps[1]
        return min(self.first, self.first + last * self.steps[0]), max(ends)


@dataclass(frozen=True, eq=False)
class Parts:
    """The parts that hold all visible pairs by ranges; a dense mask narrows them.

    lo, hi         the ranges, [B or 1, Sq]
    every          the parts
    has_all_rows   each row is in one
    splits_keys    each key is in just one
    meets_hidden   in one the kernel compares hidden keys, or too few to see all NaN, or NaN is joined
    lone           rows of one key by ranges, bool [B or 1, 1, Sq], or None where there is none
    """

    lo: Tensor
    hi: Tensor
    every: tuple[Part, ...]
    has_all_rows: bool
    splits_keys: bool
    meets_hidden: bool
    lone: Tensor | None

    @classmethod
    def of(cls, visible: Visibility, may_join: bool) -> Parts:
        """The parts of a call, of which some may join others; reads the ranges' values."""
        lo, hi = visible.ranges()
        every = tuple(_parts_of(visible, lo, hi, may_join))
        uses = torch.zeros(visible.batch, 1, visible.k_len, dtype=torch.int32, device="cpu")
        for part in every:
            part.add_to_keys(uses, torch.ones_like(part.of_keys(uses)))
        heights = [part.entries * part.height for part in every if not part.joins]
        has_all_rows = sum(heights) == visible.batch * visible.q_len
        splits_keys, lone = bool((uses == 1).all()), (hi - lo == 1)[:, None]
        meets_hidden = any(part.form == "ranges" or part.width < VECTOR or part.joins for part in every)
        facts = has_all_rows, splits_keys, meets_hidden
        return cls(lo, hi, every, *facts, lone if bool(lone.any()) else None)

    def inside(self, part: Part) -> Tensor:
        """True for pairs of a part inside of the ranges: [B or 1, 1, rows, keys]."""
        bounds = (x[part.batch if x.shape[0] > 1 else slice(None), None, part.rows, None] for x in (self.lo, self.hi))
        lo, hi = bounds
        key = torch.arange(part.keys.start, part.keys.stop, device="cpu")
        return (key >= lo) & (key < hi)

    def mask(self, part: Part, dtype: torch.dtype) -> Tensor:
        """0 for pairs of a part `inside`, and -inf for others."""
        return (_kept_mask if part.pairs <= _PAIRS_OF_KEPT else _mask)(self, part, dtype)


def parts_of(visible: Visibility, may_join: bool = False) -> Parts:
    """The parts of a call's visible pairs, kept where lengths and a window's sides determine them.

    may_join   results of two parts of a row can be joined: exact ones, of rows whose keys no bias or mask hides
    """
    by_ranges = visible if visible.mask is None else visible.once("by ranges", lambda: replace(visible, mask=None))
    return by_ranges.shared("joined parts" if may_join else "parts", lambda: Parts.of(by_ranges, may_join))


def additive(visible: Tensor, dtype: torch.dtype) -> Tensor:
    """1 - 1 / visible: 0 for True and -inf for False, in a third of the time of a masked fill."""
    return visible.to(dtype).reciprocal_().neg_().add_(1)


def _mask(parts: Parts, part: Part, dtype: torch.dtype) -> Tensor:
    return additive(parts.inside(part), dtype)


_kept_mask = functools.lru_cache(_MASKS)(_mask)


def _parts_of(visible: Visibility, lo: Tensor, hi: Tensor, may_join: bool) -> list[Part]:
    everything = slice(0, visible.batch), slice(0, visible.q_len), slice(0, visible.k_len)
    if visible.is_full or visible.is_square_causal:
        return [Part(*everything, "full" if visible.is_full else "causal")]
    parts = []
    for batch in _equal_entries(lo, hi, visible.batch):
        entry = min(batch.start, lo.shape[0] - 1), min(batch.start, hi.shape[0] - 1)
        stacks = batch.stop - batch.start == 1
        runs = _joined(_runs(lo[entry[0]], hi[entry[1]]), stacks)
        found = [part for run in runs for part in _cut(run, batch, may_join)]
        found = [part for part in found if part.width > 0]  # the kernel divides by the number of keys
        parts += _stacked(found, ("full", "causal")) if stacks else found
    masked = cut_rows(Part(*everything, "ranges"), visible.batch)
    return masked if _cost(masked, visible) < _cost(parts, visible) else parts


def _cost(parts: list[Part], visible: Visibility) -> float:
    """The pairs that the kernel computes in the time of the parts: calls, keys read, pairs of all heads, and masks."""
    masked = [part.pairs for part in parts if part.form == "ranges"]
    of_heads = visible.q_heads * sum(part.pairs for part in parts)
    read = _READ * visible.kv_heads * sum(part.entries * part.width for part in parts)
    return _CALL * (len(parts) + len(masked)) + of_heads + read + 2 * sum(masked)


def unstacked(part: Part) -> list[Part]:
    """A part as parts of count 1."""
    if part.count == 1:
        return [part]

    def moved(whole: slice, by: int) -> slice:
        return slice(whole.start + by, whole.stop + by)

    steps = [(n * part.step, n * part.key_step) for n in range(part.count)]
    return [Part(part.batch, moved(part.rows, rows), moved(part.keys, keys), part.form) for rows, keys in steps]


def by_entry(part: Part) -> list[Part]:
    """A part as parts of one batch entry each."""
    return [replace(part, batch=slice(n, n + 1)) for n in range(part.batch.start, part.batch.stop)]


def cut_rows(part: Part, masks: int) -> list[Part]:
    """A part as rectangles and ranges of few rows, so that `masks` masks of its pairs stay small."""
    size = max(_LEAST_ROWS, _PAIRS // (max(part.width, 1) * masks))
    size = size if part.form == "full" else min(size, _ROWS)
    cut = []
    for start in range(part.rows.start, part.rows.stop, size):
        rows, keys, form = slice(start, min(start + size, part.rows.stop)), part.keys, part.form
        if form == "causal":
            keys, form = slice(keys.start, keys.start + rows.stop - part.rows.start), "ranges"
        cut.append(Part(part.batch, rows, keys, form))
    return cut


def _equal_entries(lo: Tensor, hi: Tensor, batch: int) -> list[slice]:
    """Batch entries, one after the other, whose rows have equal ranges."""
    if lo.shape[0] == hi.shape[0] == 1:
        return [slice(0, batch)]
    lo, hi = lo.expand(batch, -1), hi.expand(batch, -1)
    same = ((lo[1:] == lo[:-1]) & (hi[1:] == hi[:-1])).all(-1)
    starts = [0, *(entry + 1 for entry, is_same in enumerate(same.tolist()) if not is_same), batch]
    return [slice(*ends) for ends in pairwise(starts)]


def _runs(lo: Tensor, hi: Tensor) -> list[_Run]:
    """Runs of rows [Sq], as long as can be, whose ranges move by equal steps."""
    if lo.shape[0] == 1:
        return [run for run in [_Run(0, 1, int(lo), int(hi), (0, 0))] if run.form]
    steps = torch.stack((lo.diff(), hi.diff()))
    changes = ((steps[:, 1:] != steps[:, :-1]).any(0).nonzero().flatten() + 1).tolist()
    firsts, ends = lo.tolist(), hi.tolist()
    runs, start = [], 0
    for last in [*changes, len(ends) - 1]:
        if start < last:
            step = firsts[start + 1] - firsts[start], ends[start + 1] - ends[start]
            runs.append(_Run(start, last + 1, firsts[start], ends[start], step))
            start = last + 1
    if start < len(ends):
        runs.append(_Run(start, start + 1, firsts[start], ends[start], (0, 0)))
    return [run for run in runs if run.form]


def _joined(runs: list[_Run], stacks: bool) -> list[list[_Run]]:
    """Runs by themselves, or several short ones; where parts are stacked, equal ones are one, however short."""
    alone: list[int] = []
    for (form, rows, _), equal in groupby(runs, lambda run: (run.form, run.stop - run.start, run.end - run.first)):
        count = len(list(equal))
        total = rows * count if stacks and form != "ranges" else rows
        alone += range(len(alone), len(alone) + count) if total >= _SHORTEST else [-1] * count
    return [[runs[place] for place in places] for _, places in groupby(range(len(runs)), alone.__getitem__)]


def _cut(runs: list[_Run], batch: slice, may_join: bool) -> list[Part]:
    """One part of a rectangle or a triangle, both for rows behind a prefix of keys, or parts of a few rows each."""
    run, form = runs[0], runs[0].form
    if len(runs) == 1 and form != "ranges":
        size = run.stop - run.start
        end = run.end if form == "full" else run.first + size
        return [Part(batch, slice(run.start, run.stop), slice(run.first, end), form)]
    rows, middle = slice(run.start, run.stop), run.end - 1
    is_long = len(runs) == 1 and rows.stop - rows.start >= _SPLIT and middle - run.first >= VECTOR
    if may_join and is_long and run.steps == (0, 1):
        triangle = Part(batch, rows, slice(middle, middle + rows.stop - rows.start), "causal", joins=True)
        return [Part(batch, rows, slice(run.first, middle), "full"), triangle]
    parts = []
    for run in runs:
        start = run.start
        while start < run.stop:
            moved = run.first + (start - run.start) * run.steps[0], run.end + (start - run.start) * run.steps[1]
            rest = run._replace(start=start, first=moved[0], end=moved[1])
            width = rest.end - rest.first
            size = min(_ROWS, max(_LEAST_ROWS, width if run.steps[0] else _PAIRS // max(width, 1)))
            piece = rest._replace(stop=min(run.stop, start + size))
            parts.append(Part(batch, slice(piece.start, piece.stop), slice(*piece.keys), "ranges"))
            start = piece.stop
    if len(runs) > 1:
        return _merged(parts)
    # Pieces of a window that moves by a key a row have one mask.
    is_window = run.steps == (1, 1) and batch.stop - batch.start == 1
    return _stacked(parts) if is_window else parts


def _merged(parts: list[Part]) -> list[Part]:
    """Neighbours of few rows together, up to _ROWS rows."""
    merged = parts[:1]
    for part in parts[1:]:
        last = merged[-1]
        rows = slice(last.rows.start, part.rows.stop)
        if rows.stop - rows.start > _ROWS:
            merged.append(part)
            continue
        keys = slice(min(last.keys.start, part.keys.start), max(last.keys.stop, part.keys.stop))
        merged[-1] = Part(part.batch, rows, keys, "ranges")
    return merged


def _stacked(parts: list[Part], forms: tuple[str, ...] = ("ranges",)) -> list[Part]:
    """Neighbours of one shape, form and distance as one part, which the kernel takes as batch entries."""
    stacked: list[Part] = []
    for part in parts:
        last = stacked[-1] if stacked else None
        if last is not None and part.form in forms and _follows(last, part):
            step, key_step = part.rows.start - last.rows.start, part.keys.start - last.keys.start
            step, key_step = (step, key_step) if last.count == 1 else (last.step, last.key_step)
            stacked[-1] = Part(last.batch, last.rows, last.keys, last.form, last.count + 1, step, key_step)
        else:
            stacked.append(part)
    return stacked


def _follows(last: Part, part: Part) -> bool:
    if last.form != part.form or last.joins or part.joins:
        return False
    sizes = [(one.rows.stop - one.rows.start, one.keys.stop - one.keys.start) for one in (last, part)]
    if sizes[0] != sizes[1]:
        return False
    if last.count == 1:
        is_apart = part.form == "ranges" or part.keys.start >= last.keys.stop
        return part.rows.start > last.rows.start and part.keys.start > last.keys.start and is_apart
    moved = last.rows.start + last.count * last.step, last.keys.start + last.count * last.key_step
    return moved == (part.rows.start, part.keys.start)
