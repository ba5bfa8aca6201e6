"""Checks at an access: races, uninitialised reads, and memory that an asynchronous engine still uses."""

from __future__ import annotations

import numpy as np

from .errors import PTXFault
from .instruction import Instruction
from .shadow import Shadow
from .shared_memory import cells_of

BULK = 1 << 16  # what a bulk store's source adds to `busy`


class Checks:
    """Findings go to the report; a fault raises, unless faults are collected.

    Convention of all methods: `active` holds the indices of the lanes that act, None for all of them; `cells` are
    shadow cells, `per_lane` of them for each active lane, in order.
    """

    # ---- reporting
    def lane(self, active, at: int) -> tuple[tuple, int]:
        """(CTA, thread) of the lane at a position among the active ones."""
        lane = int(at if active is None else active[at])
        return self.ctas[lane // self.threads], lane % self.threads

    def fault(
        self, instruction: Instruction, fault: str, active, at: int, address: int, what: str, nearest: str | None = None
    ) -> None:
        cta, thread = self.lane(active, at)
        where = f"CTA {cta} thread {thread} (warp {thread // 32} lane {thread % 32}), address {address:#x}"
        message = f"{fault}: {what}\n  {self.kernel.where(instruction)}\n  {where}{', ' + nearest if nearest else ''}"
        if self.collect:
            self.report.note(self.report.faults, (fault, instruction.line), instruction, message)
            return
        fields = {"cta": cta, "thread": thread, "address": address, "nearest": nearest}
        raise PTXFault(fault, message, line=instruction.line, text=instruction.text, loc=instruction.loc, **fields)

    def race(self, instruction, space, conflict, bad, active, per_lane, cells, other=None, same_value=False) -> None:
        """Report the first of the cells where `bad` holds; other: the index of the other instruction, where known."""
        at = int(np.flatnonzero(bad)[0])
        cta, thread = self.lane(active, at // per_lane)
        if space == "global":
            where = self.near_offset(int(cells[at]) * self.global_cell)
        else:
            where = f"shared byte offset {int(cells[at]) * self.shared_cell % self.shared_stride}"
        message = (
            f"{space} {conflict} race{' (same value)' if same_value else ''}: CTA {cta} thread {thread} "
            f"(warp {thread // 32}), {where}\n    {self.kernel.where(instruction)}"
        )
        other = None if other is None else self.kernel.instructions[other]
        if other is not None:
            message += f"\n    against {self.kernel.where(other)}"
        findings = self.report.benign if same_value else self.report.races
        key = (space, conflict, instruction.line, other.line if other is not None else 0)
        self.report.note(findings, key, instruction, message, int(bad.sum()))

    def uninitialised(self, instruction: Instruction, key: tuple, what: str, count: int) -> None:
        message = f"{what}\n    {self.kernel.where(instruction)}"
        self.report.note(self.report.uninitialised, (*key, instruction.line), instruction, message, count)

    # ---- accesses
    def actors_of(self, space: str, active, per_lane: int):
        """The names by which the shadow of this space knows the active lanes."""
        actors = self.actors if space == "global" else self.shared_actors
        actors = actors if active is None else actors[active]
        return actors if per_lane == 1 else np.repeat(actors, per_lane)

    def check_read(self, space: str, instruction: Instruction, flat, width: int, active) -> None:
        shadow, cell = self._shadow_of(space)
        per_lane, cells = max(1, width // cell), cells_of(flat, width, cell)
        if space == "shared":
            fresh = shadow.writer[cells] == 0
            if fresh.any():
                fresh &= np.tile(self._arrives_in_use(instruction, per_lane), len(cells) // per_lane)
            if fresh.any():
                at = int(np.flatnonzero(fresh)[0])
                cta, thread = self.lane(active, at // per_lane)
                offset = int(cells[at]) * cell % self.shared_stride
                what = f"read of uninitialised shared memory: CTA {cta} thread {thread}, byte offset {offset}"
                self.uninitialised(instruction, ("shared",), what, int(fresh.sum()))
            self.check_pending(instruction, cells, active, per_lane, "read")
            self.check_copies(instruction, cells, active, per_lane, "read")
        bad = shadow.read(cells, self.actors_of(space, active, per_lane), instruction.index)
        if bad is not None:
            other = int(shadow.writer_instruction[cells[np.argmax(bad)]])
            self.race(instruction, space, "read-after-write", bad, active, per_lane, cells, other)

    def check_write(self, space, instruction, flat, width, active, old=None, data=None, after=None, atomic=False):
        """old, data, after: rows of memory before, as written, and after; they tell races that write equal values."""
        shadow, cell = self._shadow_of(space)
        per_lane, cells = max(1, width // cell), cells_of(flat, width, cell)
        if space == "shared":
            if not atomic:
                self.unfenced[cells] = True
                self.check_barriers(instruction, cells, active, per_lane)
            self.check_pending(instruction, cells, active, per_lane, "write")
            self.check_busy(instruction, cells, active, per_lane)
            self.check_copies(instruction, cells, active, per_lane, "write")
        actors = self.actors_of(space, active, per_lane)
        with_write, with_read, within, earlier = shadow.write(cells, actors, instruction.index, atomic)
        for conflict, bad, before in (
            ("write-after-write", with_write, old),
            ("write-after-read", with_read, old),
            ("write-write (same instruction)", within, after),
        ):
            if bad is None:
                continue
            at, other = int(np.argmax(bad)), None
            if bad is with_write:
                other = int(earlier[at])
            elif bad is with_read:
                other = int(shadow.reader_instruction[cells[at]])
            rows = bad.reshape(-1, per_lane).any(1)
            same_value = before is not None and bool((before[rows] == data[rows]).all())
            self.race(instruction, space, conflict, bad, active, per_lane, cells, other, same_value)

    def _arrives_in_use(self, instruction: Instruction, per_lane: int):
        """Which of a lane's cells come to registers that some instruction uses: Triton loads padding with values."""
        loaded = instruction.written if instruction.base == "ld" else ()
        if len(loaded) < 2:
            return np.ones(per_lane, bool)
        used = np.array([register in self.flow.used for register in loaded])
        return np.repeat(used, max(1, per_lane // len(used))).reshape(per_lane, -1).any(1)

    def _shadow_of(self, space: str) -> tuple[Shadow, int]:
        if space == "global":
            return self.global_shadow, self.global_cell
        return self.shared_shadow, self.shared_cell

    def check_async_write(self, instruction, cells, active, per_lane, data, name: str) -> None:
        """Races of a write by the asynchronous engine, at its issue; data: the rows that the lanes write."""
        shadow, actors = self.shared_shadow, self.actors_of("shared", active, per_lane)
        self.check_barriers(instruction, cells, active, per_lane)
        self.check_busy(instruction, cells, active, per_lane)
        self.check_copies(instruction, cells, active, per_lane, f"{name} write")
        for conflict, bad, instructions in (
            ("write-after-read", shadow.after_read(cells, actors), shadow.reader_instruction),
            ("write-after-write", shadow.after_write(cells, actors), shadow.writer_instruction),
        ):
            if bad is not None:
                other = int(instructions[cells[np.argmax(bad)]])
                self.race(instruction, "shared", f"{name} {conflict}", bad, active, per_lane, cells, other)
        position = np.arange(len(cells), dtype=np.int32)
        self.last_lane[cells] = position
        winner = self.last_lane[cells]
        lost = winner != position
        if lost.any():
            rows = lost.reshape(-1, per_lane).any(1)
            winners = winner.reshape(-1, per_lane)[:, 0] // per_lane
            same_value = bool((data[rows] == data[winners][rows]).all())
            conflict = f"{name} write-write (same instruction)"
            self.race(instruction, "shared", conflict, lost, active, per_lane, cells, None, same_value)

    # ---- engines that still use shared memory
    def check_pending(self, instruction, cells, active, per_lane, what: str) -> None:
        if not self.cp_async_copies:
            return
        pending = self.pending[cells]
        bad = pending != 0
        if bad.any():
            other = int(pending[np.argmax(bad)]) - 1
            conflict = f"{what} of a cp.async destination before wait_group"
            self.race(instruction, "shared", conflict, bad, active, per_lane, cells, other)

    def check_busy(self, instruction, cells, active, per_lane) -> None:
        if not self.products and not self.bulk_stores:
            return
        busy = self.busy[cells]
        for bad, what in (
            ((busy & (BULK - 1)) > 0, "wgmma operand before wgmma.wait_group"),
            (busy >= BULK, "bulk store source before cp.async.bulk.wait_group"),
        ):
            if bad.any():
                self.race(instruction, "shared", f"write of a {what}", bad, active, per_lane, cells)

    def check_barriers(self, instruction, cells, active, per_lane) -> None:
        """An mbarrier's memory is for nothing else, and not for mbarrier.init, until mbarrier.inval."""
        if not self.barriers_live:
            return
        bad = self.barrier_live[cells * self.shared_cell // 8]
        if bad.any() and "inval" not in instruction.parts:
            self.race(instruction, "shared", "write over an mbarrier without inval", bad, active, per_lane, cells)

    def check_copies(self, instruction, cells, active, per_lane, what: str, warps: int = 1) -> None:
        """A bulk copy's destination is for warps that saw it arrive; warps: how many use it, from the lane's on."""
        if not self.bulk_copies:
            return
        copy = self.copy_of[cells]
        if not copy.any():
            return
        lanes = np.arange(self.lanes) if active is None else active
        warp = np.repeat(lanes % self.threads // 32, per_lane)
        seen = self.copy_seen[copy, warp]
        for other in range(1, warps):
            seen = seen & self.copy_seen[copy, warp + other]
        bad = (copy > 0) & ~seen
        if bad.any():
            other = int(self.copy_instruction[copy[np.argmax(bad)]])
            conflict = f"{what} of a bulk copy destination before the mbarrier wait"
            self.race(instruction, "shared", conflict, bad, active, per_lane, cells, other)

    def check_proxy(self, instruction, cells, active, per_lane) -> None:
        """The asynchronous engine reads generic writes only behind a proxy fence."""
        bad = self.unfenced[cells]
        if bad.any():
            other = int(self.shared_shadow.writer_instruction[cells[np.argmax(bad)]])
            conflict = "async-proxy access to generic writes without fence.proxy.async"
            self.race(instruction, "shared", conflict, bad, active, per_lane, cells, other)

    def fence_proxy(self, mask) -> None:
        """fence.proxy.async: the writes of the warps that execute it become visible to the asynchronous engine."""
        if mask is None:
            self.unfenced[:] = False
            return
        cells = np.flatnonzero(self.unfenced)
        cta = cells * self.shared_cell // self.shared_stride
        warp = self.shared_shadow.writing_warp(cells)
        is_one = warp < self.threads // 32  # else several have written the cell, and all of them must fence
        by_all = mask.reshape(-1, self.threads).all(1)[cta]
        fenced = np.where(is_one, mask[cta * self.threads + np.where(is_one, warp, 0) * 32], by_all)
        self.unfenced[cells[fenced]] = False

    # ---- registers
    def define(self, register: int, active) -> None:
        defined = self.defined.get(register)
        if defined is None:
            defined = self.defined[register] = np.zeros(self.lanes, bool)
        defined[slice(None) if active is None else active] = True

    def check_defined(self, instruction: Instruction, registers: tuple[int, ...], mask) -> None:
        for register in registers:
            defined = self.defined.get(register)
            bad = np.ones(self.lanes, bool) if defined is None else ~defined
            if mask is not None:
                bad = bad & mask
            if bad.any():
                cta, thread = self.lane(None, int(np.argmax(bad)))
                name = self.kernel.register_names[register]
                what = f"read of uninitialised register {name}: CTA {cta} thread {thread}"
                self.uninitialised(instruction, ("register", register), what, int(bad.sum()))
