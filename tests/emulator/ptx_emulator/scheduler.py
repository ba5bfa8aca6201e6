"""The next block: all threads together, or, after a divergent branch, those with the lowest program counter."""

from __future__ import annotations

import numpy as np

from .errors import PTXError
from .flow import Block
from .machine import Machine
from .program import Program

FINISHED = 1 << 30  # a program counter behind every block
_MOST_DIVERGENT_BLOCKS = 3_000_000
_FAIRNESS = (4000, 3800)  # of so many divergent blocks those behind the second number go round among all counters


class Scheduler:
    """Runs the program on the machine's batch of CTAs."""

    def __init__(self, machine: Machine, program: Program) -> None:
        self.machine, self.program = machine, program
        self.blocks = program.flow.blocks
        self.executions = machine.report.executions

    def run(self) -> None:
        """Until every thread has returned."""
        machine, program, blocks = self.machine, self.program, self.blocks
        registers, special, warps = machine.registers, machine.special, machine.lanes // 32
        counter = 0
        while True:
            block = blocks[counter]
            self.executions[counter] += warps
            program.function(counter, masked=False)(machine, registers, special)
            if block.exit == "fall":
                counter += 1
            elif block.exit == "barrier":
                machine.pass_barrier()
                counter += 1
            else:
                taken = self._takes_exit(block)
                count = machine.lanes if block.register is None else int(np.count_nonzero(taken))
                if count == machine.lanes:
                    if block.exit == "return":
                        return
                    counter = block.target
                elif count == 0:
                    counter += 1
                else:
                    counter = self._run_diverged(np.where(taken, destination(block), counter + 1))
                    if counter == FINISHED:
                        return

    def _takes_exit(self, block: Block):
        """The lanes that take the branch or return: all where it has no condition."""
        if block.register is None:
            return True
        condition = self.machine.registers[block.register]
        return ~condition if block.negated else condition

    def _run_diverged(self, counters) -> int:
        """From per-thread program counters to the block where all have met again, or FINISHED."""
        machine = self.machine
        waiting = np.zeros(machine.lanes, bool)
        steps, floor = 0, -1
        while True:
            alive = counters != FINISHED
            if not alive.any():
                return FINISHED
            ready = alive & ~waiting
            if not waiting.any() and alive.all() and (counters == counters[0]).all():
                return int(counters[0])
            candidates = counters[ready]
            counter = int(candidates.min())
            if steps % _FAIRNESS[0] > _FAIRNESS[1]:  # someone may spin on a thread further on
                later = candidates[candidates > floor]
                counter = int(later.min()) if len(later) else counter
                floor = counter if len(later) else -1
            self._step(counter, ready & (counters == counter), counters, waiting)
            steps += 1
            if steps > _MOST_DIVERGENT_BLOCKS:
                raise PTXError(f"no progress after {steps} divergent blocks (a spin on a CTA of a later batch?)")

    def _step(self, counter: int, mask, counters, waiting) -> None:
        """Run one block under a mask; update the counters, and who waits at a barrier."""
        machine, block = self.machine, self.blocks[counter]
        self.executions[counter] += int(np.count_nonzero(mask.reshape(-1, 32).any(1)))
        self.program.function(counter, masked=True)(machine, machine.registers, machine.special, mask)
        counters[mask] = counter + 1
        if block.exit == "barrier":
            waiting |= mask
            released = self._release(counters, waiting)
            if (mask.reshape(len(released), -1).any(1) & ~released).any():
                barrier = machine.kernel.instructions[block.end - 1]
                what = "barrier reached by only part of a CTA at once (divergent barrier)"
                message = f"{what}\n    {machine.kernel.where(barrier)}"
                machine.report.note(machine.report.notes, ("barrier", barrier.line), barrier, message)
        elif block.exit != "fall":
            counters[mask & self._takes_exit(block)] = destination(block)
            if block.exit == "return" and waiting.any():
                self._release(counters, waiting)

    def _release(self, counters, waiting):
        """Let the CTAs go on whose threads all wait, those that have returned left out; a mask of these CTAs."""
        machine = self.machine
        by_cta = (machine.cta_count, machine.threads)
        waits, gone = waiting.reshape(by_cta), (counters == FINISHED).reshape(by_cta)
        released = (waits | gone).all(1) & waits.any(1)
        if released.any():
            machine.pass_barrier(released)
            waiting &= ~np.repeat(released, machine.threads)
        return released


def destination(block: Block) -> int:
    return FINISHED if block.exit == "return" else block.target
