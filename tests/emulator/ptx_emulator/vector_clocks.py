"""Order between the warps of specialised kernels, whose barriers are not those of a whole CTA: vector clocks.

Mattern 1989, "Virtual time and global states of distributed systems". The races that they show are those of the order
that the program demands, not of the one order that ran.
"""

from __future__ import annotations

import numpy as np
from numpy import int32 as i4
from numpy import int64 as i8


class VectorShadow:
    """As `Shadow`, of shared memory, with a clock for each warp instead of one barrier epoch per CTA.

    An access conflicts with an earlier one of another warp unless it knows that warp's clock at the time.

    clocks[warp, other]   the latest clock of `other`, a warp of the same CTA, that is ordered before `warp` now
    writer                0: never written; else clock << 8 | warp + 1
    readers[cell, warp]   the warp's clock at its last read
    actors                in all methods the numbers of the warps in the batch
    """

    def __init__(self, cells: int, clocks: np.ndarray) -> None:
        self.clocks, self.warps = clocks, clocks.shape[1]
        self.writer = np.zeros(cells, i8)
        self.readers = np.zeros((cells, self.warps), i4)
        self.writer_instruction, self.reader_instruction = np.zeros(cells, i4), np.zeros(cells, i4)

    def after_write(self, cells, actors):
        """Which of the last writes are not ordered before these warps; None where all are."""
        writer = self.writer[cells]
        bad = (writer >> 8) > self.clocks[actors, np.maximum(self.writing_warp(cells), 0)]
        return bad if bad.any() else None

    def after_read(self, cells, actors):
        """The same of the last reads of every warp."""
        bad = (self.readers[cells] > self.clocks[actors]).any(1)
        return bad if bad.any() else None

    def read(self, cells, actors, instruction: int):
        bad = self.after_write(cells, actors)
        self._note_read(cells, actors)
        self.reader_instruction[cells] = instruction
        return bad

    def write(self, cells, actors, instruction: int, atomic: bool = False):
        """As `Shadow.write`. Operations on mbarriers (atomic) are ordered by the mbarrier: none is recorded."""
        with_write, with_read = self.after_write(cells, actors), self.after_read(cells, actors)
        earlier = self.writer_instruction[cells] if with_write is not None else None
        if atomic:
            return with_write, with_read, None, earlier
        key = self._key(actors)
        self.writer[cells] = key
        within = self.writer[cells] != key
        self.writer_instruction[cells] = instruction
        return with_write, with_read, within if within.any() else None, earlier

    def begin_async_read(self, cells, actors, instruction: int, warps: int):
        found = [self.after_write(cells, actors + warp) for warp in range(warps)]
        self.reader_instruction[cells] = instruction
        found = [bad for bad in found if bad is not None]
        return np.any(found, axis=0) if found else None

    def end_async_read(self, cells, actors, warps: int) -> None:
        for warp in range(warps):
            self._note_read(cells.ravel(), np.repeat(actors + warp, cells.shape[1]))

    def acting_write(self, cells, actors) -> None:
        self.writer[cells] = self._key(actors)[:, None]

    def settled_write(self, cells, actors) -> None:
        self.writer[cells] = 1

    def writing_warp(self, cells):
        return (self.writer[cells] & 255) - 1

    def _key(self, actors):
        """The value of `writer` after a write by these warps now."""
        warp = actors % self.warps
        return self.clocks[actors, warp] << 8 | (warp + 1)

    def _note_read(self, cells, actors) -> None:
        warp = actors % self.warps
        self.readers[cells, warp] = self.clocks[actors, warp]


class Clocks:
    """The clocks of a batch; with them travels which bulk copies a warp has seen arrive (`copy_seen`).

    arrived     by mbarrier: clocks of all that arrived, and the copies that they had seen
    completed   the same when its last phase completed
    events      how many there were of those that can end somebody's wait
    """

    def start_clocks(self) -> None:
        warps = self.threads // 32
        self.clocks = np.zeros((self.cta_count * warps, warps), i8)
        self.clocks[np.arange(len(self.clocks)), np.arange(len(self.clocks)) % warps] = 1
        self.arrived: dict[int, tuple[np.ndarray, frozenset[int]]] = {}
        self.completed: dict[int, tuple[np.ndarray, frozenset[int]]] = {}
        self.events = 0

    def _tick(self, warps) -> None:
        self.clocks[warps, warps % self.clocks.shape[1]] += 1

    def meet(self, warps) -> None:
        """These warps of one CTA met at a barrier: each knows what all knew."""
        in_cta = warps % self.clocks.shape[1]
        self.clocks[warps] = self.clocks[warps].max(0)
        self.copy_seen[:, in_cta] |= self._seen_by(warps)[:, in_cta].any(1)[:, None]
        self._tick(warps)
        self.events += 1

    def release(self, lanes, entries) -> None:
        """Lanes arrive at mbarriers."""
        for lane, entry in zip((lanes // 32).tolist(), entries.tolist(), strict=True):
            clocks, seen = self.arrived.get(entry, (0, frozenset()))
            known = frozenset(np.flatnonzero(self._seen_by(np.array([lane]))[:, lane % self.clocks.shape[1]]).tolist())
            self.arrived[entry] = (np.maximum(clocks, self.clocks[lane]), seen | known)
        self._tick(np.unique(lanes // 32))
        self.events += 1

    def acquire(self, lanes, entries) -> None:
        """Lanes saw the last phase of mbarriers complete."""
        for warp, entry in {*zip((lanes // 32).tolist(), entries.tolist(), strict=True)}:
            clocks, seen = self.completed.get(entry, (0, ()))
            self.clocks[warp] = np.maximum(self.clocks[warp], clocks)
            self.copy_seen[list(seen), warp % self.clocks.shape[1]] = True

    def complete_order(self, barriers) -> None:
        for entry in barriers.tolist():
            if entry in self.arrived:
                self.completed[entry] = self.arrived[entry]
        self.events += 1

    def _seen_by(self, warps):
        """`copy_seen`, of the copies of these warps' CTA only."""
        cta = int(warps[0]) // self.clocks.shape[1]
        of_cta = np.zeros(len(self.copy_seen), bool)
        for copy in self.bulk_copies:
            of_cta[copy.ids[copy.lanes // self.threads == cta]] = True
        return self.copy_seen & of_cta[:, None]
