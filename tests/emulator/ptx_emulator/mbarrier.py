"""mbarriers: phases that complete when the expected threads have arrived and the expected bytes were copied."""

from __future__ import annotations

import numpy as np
from numpy import int64 as i8

from .errors import PTXError
from .instruction import Instruction

_FRUITLESS_WAITS = (100, 20_000)  # until a wait counts as a deadlock: when all threads fail, when some do


class MemoryBarriers:
    """State lies next to shared memory, one entry for every 8 bytes: arrivals expected in a phase, arrivals and bytes
    still missing in the current one, its number, and whether the barrier is initialised."""

    def start_memory_barriers(self) -> None:
        entries = len(self.shared) // 8 + 1
        self.arrivals_expected, self.arrivals_missing, self.bytes_missing, self.phase = np.zeros((4, entries), i8)
        self.barrier_live = np.zeros(entries, bool)
        self.barriers_live = 0
        self.fruitless_waits = 0

    def barriers_at(self, instruction: Instruction, address, mask, live: bool = True):
        """(lanes, entries of the mbarriers that they name); (None, None) when no lane is active."""
        active = self.select(mask)
        lanes = np.arange(self.lanes) if active is None else active
        if not len(lanes):
            return None, None
        flat = self.shared_offsets(instruction, address if active is None else address[active], 8, active)
        entries = flat // 8
        if live and not self.barrier_live[entries].all():
            at = int(np.argmin(self.barrier_live[entries]))
            what = "no initialised mbarrier at this address"
            self.fault(instruction, "mbarrier", active, at, int(address[lanes[at]]), what)
        self.check_write("shared", instruction, flat, 8, active, atomic=live)
        return lanes, entries

    def init_barrier(self, instruction: Instruction, address, arrivals: int | None, mask) -> None:
        """mbarrier.init; None: mbarrier.inval."""
        lanes, entries = self.barriers_at(instruction, address, mask, live=False)
        if lanes is None:
            return
        for copy in self.bulk_copies:
            bad = ~copy.done & np.isin(copy.barrier, entries)
            if bad.any():
                conflict = "mbarrier (re)initialised with a bulk copy in flight"
                self.race(instruction, "shared", conflict, bad, copy.lanes, 1, copy.cells[:, 0], copy.instruction.index)
        self.arrive_copies(np.unique(entries))
        self.barrier_live[entries] = arrivals is not None
        self.barriers_live = int(np.count_nonzero(self.barrier_live))
        self.arrivals_expected[entries] = self.arrivals_missing[entries] = arrivals or 0
        self.bytes_missing[entries] = self.phase[entries] = 0

    def arrive(self, instruction: Instruction, address, count, size, mask) -> None:
        """`count` arrivals and `size` more bytes to expect, from each lane."""
        lanes, entries = self.barriers_at(instruction, address, mask)
        if lanes is None:
            return
        self.fruitless_waits = 0
        barriers, position = np.unique(entries, return_inverse=True)
        arrivals, expected = np.zeros((2, len(barriers)), i8)
        np.add.at(arrivals, position, count if np.ndim(count) == 0 else count[lanes])
        np.add.at(expected, position, size if np.ndim(size) == 0 else size[lanes])
        self._make_room(instruction, address, lanes, entries, barriers, arrivals, position)
        if self.specialised:
            self.release(lanes, entries)
        self.bytes_missing[barriers] += expected
        self.arrivals_missing[barriers] -= arrivals
        self.complete_phases(barriers)

    def _make_room(self, instruction, address, lanes, entries, barriers, arrivals, position) -> None:
        """Arrivals of the next phase come only when the last one is known to be complete."""
        excess = self.arrivals_missing[barriers] < arrivals
        if not excess.any():
            return
        conflict = "mbarrier arrive while the previous phase is not known to be complete"
        self.race(instruction, "shared", conflict, excess[position], lanes, 1, entries * 8 // self.shared_cell)
        self.arrive_copies(barriers[excess])
        excess = self.arrivals_missing[barriers] < arrivals
        if excess.any():
            at = int(np.argmax(excess[position]))
            what = "more arrivals than the mbarrier expects in one phase"
            self.fault(instruction, "mbarrier", lanes, at, int(address[lanes[at]]), what)

    def complete_phases(self, barriers) -> None:
        """Start the next phase where nothing is missing."""
        missing = (self.arrivals_missing[barriers] != 0) | (self.bytes_missing[barriers] != 0)
        complete = barriers[~missing & self.barrier_live[barriers]]
        self.phase[complete] += 1
        if self.specialised and len(complete):
            self.complete_order(complete)
        self.arrivals_missing[complete] = self.arrivals_expected[complete]

    def wait_barrier(self, instruction: Instruction, address, parity, mask):
        """True where the phase of this parity is complete. Copies arrive as late as possible: when somebody waits."""
        result = np.zeros(self.lanes, bool)
        lanes, entries = self.barriers_at(instruction, address, mask)
        if lanes is None:
            return result
        parity = parity if np.ndim(parity) == 0 else parity[lanes]
        complete = (self.phase[entries] & 1) != parity
        if not complete.all():
            self.arrive_copies(np.unique(entries[~complete]))
            complete = (self.phase[entries] & 1) != parity
        self._count_wait(instruction, complete, mask)
        if self.specialised and complete.any():
            self.acquire(lanes[complete], entries[complete])
        if self.bulk_copies and complete.any():
            self._see_copies(lanes[complete], entries[complete])
        result[lanes] = complete
        return result

    def _count_wait(self, instruction: Instruction, complete, mask) -> None:
        self.fruitless_waits = 0 if complete.all() else self.fruitless_waits + 1
        limit = _FRUITLESS_WAITS[mask is not None or bool(complete.any())]
        if self.fruitless_waits > limit:
            found = "".join(f"\n  found before: {one['message']}" for one in self.report.problems()[:3])
            where = self.kernel.where(instruction)
            raise PTXError(f"deadlock: wait for an mbarrier phase that never completes\n  {where}{found}")

    def _see_copies(self, lanes, entries) -> None:
        """The warps of these lanes now know that the copies that report to these barriers have arrived."""
        barriers, position = np.unique(entries, return_inverse=True)
        told = np.zeros((len(barriers), self.threads // 32), bool)
        told[position, lanes % self.threads // 32] = True
        for copy in self.bulk_copies:
            at = np.minimum(np.searchsorted(barriers, copy.barrier), len(barriers) - 1)
            arrived = (barriers[at] == copy.barrier) & copy.done
            self.copy_seen[copy.ids[arrived]] |= told[at[arrived]]
