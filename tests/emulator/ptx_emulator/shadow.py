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

    def conflicts(self, previous, own, atomic: bool = False):
        """Which of the earlier accesses conflict with one's own: a mask, or None where none does."""
        recent = previous >= (own & ~WITHIN_EPOCH)
        if self.local and not recent.any():
            return None
        bad = recent & (((previous ^ own) & WARP) != 0)
        if not self.local:
            bad = (previous != 0) & (bad | ((previous ^ own) >> CTA_BITS != 0))
        if atomic:
            plain = (previous & ATOMIC) == 0
            if not self.local:
                plain |= ((previous & PLAIN_BEFORE) != 0) & ((previous ^ own) >> CTA_BITS != 0)
            bad &= plain
        return bad if bad.any() else None

    def after_write(self, cells, own):
        """Which accesses conflict with the last write; None where none does."""
        return self.conflicts(self.writer[cells], own)

    def after_read(self, cells, own):
        """Which accesses, of writers, conflict with the last reads; None where none does."""
        return self.conflicts(self.reader[cells], own)

    def read(self, cells, own, instruction: int):
        """Note a read; conflicts with an earlier write."""
        bad = self.after_write(cells, own)
        last = self.reader[cells]
        if self.local:
            joined = (last >= (own & ~WITHIN_EPOCH)) & (last != own)
            key = np.where(joined, own | SEVERAL_WARPS, own)
        else:
            difference = last ^ own
            other_cta = (last != 0) & (difference >> CTA_BITS != 0)
            other_warp = (difference >> i8(8) == 0) & (difference != 0)
            everyone = (own & i8(0xFFFFFFFF)) | SEVERAL_CTAS | SEVERAL_WARPS
            key = np.where(other_cta, everyone, np.where(other_warp, own | SEVERAL_WARPS, own))
        self.reader[cells] = key
        kept = self.reader[cells]
        lost = kept != key
        if lost.any():  # several warps, or CTAs, read the cell in this one instruction
            several = np.where((kept[lost] ^ key[lost]) >> CTA_BITS != 0, SEVERAL_CTAS | SEVERAL_WARPS, SEVERAL_WARPS)
            self.reader[cells[lost]] = several | key[lost]
        self.reader_instruction[cells] = instruction
        return bad

    def write(self, cells, own, instruction: int, atomic: bool = False):
        """Note a write: conflicts with an earlier write, with an earlier read, with another warp in this instruction,
        and the instructions of the earlier writes (None where there is no conflict with one)."""
        previous = self.writer[cells]
        with_write = self.conflicts(previous, own, atomic)
        with_read = self.after_read(cells, own)
        earlier = self.writer_instruction[cells] if with_write is not None else None
        within = None
        if atomic:
            self._write_atomically(cells, own, previous)
        else:
            self.writer[cells] = own
            within = self.writer[cells] != own
            within = within if within.any() else None
        self.writer_instruction[cells] = instruction
        return with_write, with_read, within, earlier

    def _write_atomically(self, cells, own, previous) -> None:
        """The writer's key stands for all earlier ones that do not conflict: other atomics, and plain writes of this
        warp or from before a barrier."""
        difference, plain = previous ^ own, (previous & ATOMIC) == 0
        same_cta, same_epoch = difference >> CTA_BITS == 0, difference >> i8(8) == 0
        key = own | ATOMIC
        if not self.local:
            once_plain = plain | ((previous & PLAIN_BEFORE) != 0)
            key = np.where(same_cta & once_plain, key | PLAIN_BEFORE, key)
            key = np.where((previous != 0) & ~same_cta, key | SEVERAL_CTAS | SEVERAL_WARPS, key)
        key = np.where(same_epoch & ((difference & WARP) != 0), key | SEVERAL_WARPS, key)
        key = np.where(same_epoch & plain, own, key)
        self.writer[cells] = key
        kept = self.writer[cells]
        lost = kept != key
        if lost.any():  # several warps, or CTAs, in this one instruction
            several = np.where((kept[lost] ^ key[lost]) >> CTA_BITS != 0, SEVERAL_CTAS | SEVERAL_WARPS, SEVERAL_WARPS)
            self.writer[cells[lost]] = several | key[lost]

    # ---- the asynchronous engine, in shared memory; own: of the warps that it acts for, or of the first of `warps`
    def begin_async_read(self, cells, own, instruction: int, warps: int):
        """Note a read by the engine; conflicts with an earlier write."""
        return self.read(cells, _engine_of(own), instruction)

    def end_async_read(self, cells, own, warps: int) -> None:
        """A read of rows of cells ends now: a later write needs a barrier behind this point."""
        self.reader[cells] = _engine_of(own)[:, None]

    def own_write(self, cells, own) -> None:
        """Writes of the engine count as written by these warps now."""
        self.writer[cells] = own[:, None]

    def settled_write(self, cells, own) -> None:
        """Writes of the engine conflict with no later access of these warps' CTAs."""
        self.writer[cells] = (own >> CTA_BITS << CTA_BITS)[:, None]

    def writing_warp(self, cells):
        """The warp, of its CTA, that wrote each cell last; a higher number where several did."""
        return self.writer[cells] & WARP


def _engine_of(own):
    """The key of the asynchronous engine that acts for these warps."""
    return (own & ~WITHIN_EPOCH) | ASYNC
