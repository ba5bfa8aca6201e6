"""Who touched a byte last: the memory of the race checks."""

from __future__ import annotations

import numpy as np
from numpy import int32 as i4
from numpy import int64 as i8

# An access's key: cta + 1 << 32 | barrier epoch << 8 | PLAIN_BEFORE | ATOMIC | warp.
WARP = i8(63)
SEVERAL_WARPS = i8(63)
ASYNC = i8(62)  # the asynchronous engine: nobody's warp
ATOMIC = i8(64)
PLAIN_BEFORE = i8(128)  # of an atomic: the CTA wrote otherwise in an earlier epoch
SEVERAL_CTAS = i8(1 << 62)
WITHIN_EPOCH = i8(255)
CTA_BITS = i8(32)


class Shadow:
    """Last writer and last reader of every cell, a cell being the smallest width that the kernel accesses.

    Two accesses conflict when their CTAs differ, or when the epoch is the same and the warps differ; at least one of
    them writes, not both are atomic. With local=True (shared memory) a cell is one CTA's: only epoch and warp count.
    """

    def __init__(self, cells: int, local: bool) -> None:
        self.writer, self.reader = np.zeros(cells, i8), np.zeros(cells, i8)
        self.writer_instruction, self.reader_instruction = np.zeros(cells, i4), np.zeros(cells, i4)
        self.local = local

    def conflicts(self, previous, actors, atomic: bool = False):
        """The earlier accesses that conflict with those of `actors` (keys): a mask, or None where none does."""
        recent = previous >= (actors & ~WITHIN_EPOCH)
        if self.local and not recent.any():
            return None
        bad = recent & (((previous ^ actors) & WARP) != 0)
        if not self.local:
            bad = (previous != 0) & (bad | ((previous ^ actors) >> CTA_BITS != 0))
        if atomic:
            plain = (previous & ATOMIC) == 0
            if not self.local:
                plain |= ((previous & PLAIN_BEFORE) != 0) & ((previous ^ actors) >> CTA_BITS != 0)
            bad &= plain
        return bad if bad.any() else None

    def after_write(self, cells, actors):
        """Which accesses conflict with the last write; None where none does."""
        return self.conflicts(self.writer[cells], actors)

    def after_read(self, cells, actors):
        """Which accesses, of writers, conflict with the last reads; None where none does."""
        return self.conflicts(self.reader[cells], actors)

    def read(self, cells, actors, instruction: int):
        """Note a read; conflicts with an earlier write."""
        bad = self.after_write(cells, actors)
        last = self.reader[cells]
        if self.local:
            joined = (last >= (actors & ~WITHIN_EPOCH)) & (last != actors)
            key = np.where(joined, actors | SEVERAL_WARPS, actors)
        else:
            difference = last ^ actors
            other_cta = (last != 0) & (difference >> CTA_BITS != 0)
            other_warp = (difference >> i8(8) == 0) & (difference != 0)
            everyone = (actors & i8(0xFFFFFFFF)) | SEVERAL_CTAS | SEVERAL_WARPS
            key = np.where(other_cta, everyone, np.where(other_warp, actors | SEVERAL_WARPS, actors))
        self.reader[cells] = key
        kept = self.reader[cells]
        lost = kept != key
        if lost.any():  # several warps, or CTAs, read the cell in this one instruction
            several = np.where((kept[lost] ^ key[lost]) >> CTA_BITS != 0, SEVERAL_CTAS | SEVERAL_WARPS, SEVERAL_WARPS)
            self.reader[cells[lost]] = several | key[lost]
        self.reader_instruction[cells] = instruction
        return bad

    def write(self, cells, actors, instruction: int, atomic: bool = False):
        """Note a write: conflicts with an earlier write, with an earlier read, with another warp in this instruction,
        and the instructions of the earlier writes (None where there is no conflict with one)."""
        previous = self.writer[cells]
        with_write = self.conflicts(previous, actors, atomic)
        with_read = self.after_read(cells, actors)
        earlier = self.writer_instruction[cells] if with_write is not None else None
        within = None
        if atomic:
            self._write_atomically(cells, actors, previous)
        else:
            self.writer[cells] = actors
            within = self.writer[cells] != actors
            within = within if within.any() else None
        self.writer_instruction[cells] = instruction
        return with_write, with_read, within, earlier

    def _write_atomically(self, cells, actors, previous) -> None:
        """The writer's key stands for all earlier ones that do not conflict: other atomics, and plain writes of this
        warp or from before a barrier."""
        difference, plain = previous ^ actors, (previous & ATOMIC) == 0
        same_cta, same_epoch = difference >> CTA_BITS == 0, difference >> i8(8) == 0
        key = actors | ATOMIC
        if not self.local:
            once_plain = plain | ((previous & PLAIN_BEFORE) != 0)
            key = np.where(same_cta & once_plain, key | PLAIN_BEFORE, key)
            key = np.where((previous != 0) & ~same_cta, key | SEVERAL_CTAS | SEVERAL_WARPS, key)
        key = np.where(same_epoch & ((difference & WARP) != 0), key | SEVERAL_WARPS, key)
        key = np.where(same_epoch & plain, actors, key)
        self.writer[cells] = key
        kept = self.writer[cells]
        lost = kept != key
        if lost.any():  # several warps, or CTAs, in this one instruction
            several = np.where((kept[lost] ^ key[lost]) >> CTA_BITS != 0, SEVERAL_CTAS | SEVERAL_WARPS, SEVERAL_WARPS)
            self.writer[cells[lost]] = several | key[lost]

    # ---- the asynchronous engine, in shared memory; actors: the warps that it acts for, or the first of `warps`
    def begin_async_read(self, cells, actors, instruction: int, warps: int):
        """Note a read by the engine; conflicts with an earlier write."""
        return self.read(cells, _engine_of(actors), instruction)

    def end_async_read(self, cells, actors, warps: int) -> None:
        """A read of rows of cells ends now: a later write needs a barrier behind this point."""
        self.reader[cells] = _engine_of(actors)[:, None]

    def acting_write(self, cells, actors) -> None:
        """Writes of the engine count as written by these warps now."""
        self.writer[cells] = actors[:, None]

    def settled_write(self, cells, actors) -> None:
        """Writes of the engine conflict with no later access of these warps' CTAs."""
        self.writer[cells] = (actors >> CTA_BITS << CTA_BITS)[:, None]

    def writing_warp(self, cells):
        """The warp, of its CTA, that wrote each cell last; a higher number where several did."""
        return self.writer[cells] & WARP


def _engine_of(actors):
    """The key of the asynchronous engine that acts for these warps."""
    return (actors & ~WITHIN_EPOCH) | ASYNC
