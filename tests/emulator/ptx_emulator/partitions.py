"""Which block runs next where warps are specialised: any order of the warps is right, and a policy picks one."""

from __future__ import annotations

import numpy as np

from .errors import PTXError
from .flow import Block
from .instruction import Operand
from .machine import Machine
from .program import Program
from .scheduler import FINISHED, Scheduler, destination
from .warpgroup_products import WARPGROUP

POLICIES = ("round-robin", "first-warp", "last-warp", "random")
_MOST_REGISTERS = 255  # of a thread
_CTA_BARRIER = [Operand("integer", 0)]


class PartitionScheduler(Scheduler):
    """Each warp runs by itself; one that waits for an mbarrier is left alone until something has happened.

    policy      round-robin: a block of each warp in turn; first-warp, last-warp: the first or last of the CTA as long
                as it can go on; random: any, and of the warps at the same block any subset. wgmma takes four at once
    counters    by lane, the block that is next
    barrier     by lane, the named barrier at which it waits, else -1; expected: for how many threads, 0 for all
    failed      by lane, machine.events at its last fruitless wait for an mbarrier
    held        by warp, registers of a thread: setmaxnreg.inc waits until the CTA's pool has enough
    in_step     by block, whether all lanes of a warp have to run it together
    """

    def __init__(self, machine: Machine, program: Program, policy: str = "round-robin", seed: int = 0) -> None:
        super().__init__(machine, program)
        self.policy, self.random, self.last = policy, np.random.default_rng(seed), -1
        bodies = [program.flow.instructions[block.start : block.end] for block in self.blocks]
        self.waits = [any("try_wait" in one.parts for one in body) for body in bodies]
        self.whole = [any(one.base == "wgmma" for one in body) for body in bodies]
        self.in_step = [any("sync" in one.parts for one in body) for body in bodies]
        self.registers = [body[0].operands[0].value if body[0].base == "setmaxnreg" else None for body in bodies]
        self.warps = machine.threads // 32
        self.registers_at_start = machine.kernel.max_registers or _MOST_REGISTERS

    def run(self) -> None:
        machine = self.machine
        self.counters, self.expected = np.zeros((2, machine.lanes), np.int64)
        self.barrier, self.failed = np.full((2, machine.lanes), -1)
        self.held = np.full(machine.lanes // 32, self.registers_at_start)
        while (self.counters != FINISHED).any():
            ready = (self.counters != FINISHED) & (self.barrier < 0) & (self.failed != machine.events)
            candidates = {int(counter): self._able(int(counter), ready) for counter in np.unique(self.counters[ready])}
            able = np.any([np.zeros(machine.lanes, bool), *candidates.values()], axis=0)
            if not able.any():
                self._report_deadlock()
            warp = self._choose(np.flatnonzero(able.reshape(-1, 32).any(1)))
            counter = int(self.counters[32 * warp : 32 * warp + 32][able[32 * warp : 32 * warp + 32]].min())
            mask = self._part(counter, candidates[counter], warp)
            self.last = int(np.flatnonzero(mask)[-1]) // 32
            self._run_block(counter, mask)

    def _able(self, counter: int, ready):
        """Which of the lanes that are ready can run a block."""
        mask = ready & (self.counters == counter)
        if self.in_step[counter]:  # lanes that left the warp at a branch come first: the join may stand before them
            elsewhere = (self.counters != counter) & (self.counters != FINISHED)
            mask &= ~np.repeat(elsewhere.reshape(-1, 32).any(1), 32)
        if self.whole[counter]:
            mask &= np.repeat(mask.reshape(-1, WARPGROUP).all(1), WARPGROUP)
        wanted = self.registers[counter]
        if wanted is not None:
            total = np.repeat(self.held.reshape(-1, self.warps).sum(1), self.warps)
            mask &= np.repeat(total - self.held + wanted <= self.warps * self.registers_at_start, 32)
        return mask

    def _choose(self, warps) -> int:
        if self.policy == "random":
            return int(self.random.choice(warps))
        if self.policy == "round-robin":
            later = warps[warps > self.last]
            return int(later[0] if len(later) else warps[0])
        in_cta = warps % self.warps
        return int(warps[np.argmin(in_cta) if self.policy == "first-warp" else np.argmax(in_cta)])

    def _part(self, counter: int, mask, warp: int):
        """The lanes that run a block together, those of one warp among them."""
        by_warp = np.ones(len(self.held), bool)
        if self.registers[counter] is not None:
            by_warp[:] = False
        elif self.policy == "random" and not self.whole[counter]:
            by_warp = self.random.random(len(by_warp)) < 0.5
        by_warp[warp] = True
        return mask & np.repeat(by_warp, 32)

    def _run_block(self, counter: int, mask) -> None:
        machine, block = self.machine, self.blocks[counter]
        warps = mask.reshape(-1, 32).any(1)
        self.executions[counter] += int(np.count_nonzero(warps))
        if self.registers[counter] is not None:
            self.held[warps] = self.registers[counter]
            machine.events += 1
        self.program.function(counter, masked=True)(machine, machine.registers, machine.special, mask)
        self.counters[mask] = counter + 1
        if block.exit == "barrier":
            self._arrive(block, mask)
        elif block.exit == "switch":
            index = machine.registers[block.register][mask].astype(np.int64)
            if (index >= len(block.target)).any():
                raise PTXError("brx.idx: an index outside its table")
            self.counters[mask] = np.array(block.target)[index]
        elif block.exit != "fall":
            leaves = mask & self._takes_exit(block)
            self.counters[leaves] = destination(block)
            if block.target == counter and self.waits[counter]:
                self.failed[leaves] = machine.events
            if block.exit == "return":
                self._release_barriers()

    def _arrive(self, block: Block, mask) -> None:
        """bar.sync [number [, threads]]; without threads for the whole CTA."""
        operands = self.machine.kernel.instructions[block.end - 1].operands or _CTA_BARRIER
        self.expected[mask] = 0
        for field, operand in zip((self.barrier, self.expected), operands, strict=False):
            value = operand.value if operand.form == "integer" else self.machine.registers[operand.value][mask]
            field[mask] = value
        self._release_barriers()

    def _release_barriers(self) -> None:
        """Let those go on whose barrier is complete."""
        threads = self.machine.threads
        for first in range(0, self.machine.lanes, threads):
            lanes = slice(first, first + threads)
            gone = int(np.count_nonzero(self.counters[lanes] == FINISHED))
            for number in np.unique(self.barrier[lanes][self.barrier[lanes] >= 0]):
                there = self.barrier[lanes] == number
                counts = {int(one) or threads - gone for one in np.unique(self.expected[lanes][there])}
                arrived = int(np.count_nonzero(there))
                if len(counts) > 1 or arrived > min(counts):
                    wanted = " and ".join(map(str, sorted(counts)))
                    raise PTXError(f"barrier {number}: expected {wanted} threads, got {arrived}")
                if counts == {arrived}:
                    met = np.flatnonzero(there) + first
                    self.barrier[met] = -1
                    self.machine.meet(np.unique(met // 32))

    def _report_deadlock(self) -> None:
        positions = []
        for counter in np.unique(self.counters[self.counters != FINISHED]):
            at = self.counters == counter
            block, back = self.blocks[int(counter)], int((self.barrier[at] >= 0).all())
            instruction = self.machine.kernel.instructions[block.start - back]
            warps = np.unique(np.flatnonzero(at) // 32).tolist()
            positions.append(f"\n  warps {warps}: {self.machine.kernel.where(instruction)}")
        raise PTXError("deadlock: every warp waits" + "".join(positions))
