"""Basic blocks of a kernel, and which registers may be read too early."""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property
from typing import NamedTuple

from .instruction import Instruction, registers_of
from .parse import Kernel


class Block(NamedTuple):
    """Instructions [start, end) and how control leaves them.

    exit     "fall", "barrier", "branch", "switch" or "return"
    target   of a branch: number of a block; of a switch: numbers, by index
    register, negated   of a conditional exit: its predicate; register is None where the exit is taken by all
    """

    start: int
    end: int
    exit: str
    target: int | list[int] | None
    register: int | None
    negated: bool


class Flow:
    """The control flow graph of a kernel."""

    def __init__(self, kernel: Kernel) -> None:
        self.kernel = kernel
        self.instructions = kernel.instructions
        self._end_with_return()
        starts = sorted(self._starts())
        number = {start: block for block, start in enumerate(starts)}
        block_of_label = {label: number[at] for label, at in kernel.labels.items() if at in number}
        ends = [*starts[1:], len(self.instructions)]
        self.blocks = [self._block(start, end, block_of_label) for start, end in zip(starts, ends, strict=True)]

    @cached_property
    def specialised(self) -> bool:
        """True where warps run different code and meet at named barriers: all such kernels move registers."""
        return any(one.base == "setmaxnreg" for one in self.instructions)

    @cached_property
    def used(self) -> frozenset[int]:
        """Registers that some instruction reads."""
        return frozenset(register for one in self.instructions for register in one.used)

    def body(self, number: int) -> list[Instruction]:
        """The instructions of a block, its branch or return left out."""
        block = self.blocks[number]
        return self.instructions[block.start : block.end - (block.exit in ("branch", "switch", "return"))]

    @cached_property
    def doubtful(self) -> set[int]:
        """Registers with a use that is not preceded by an unpredicated write on every path: checked at run time."""
        written = [self._written(number) for number in range(len(self.blocks))]
        before = self._written_before(written)
        found = set()
        for block, known in zip(self.blocks, before, strict=True):
            for instruction in self.instructions[block.start : block.end]:
                found.update(register for register in instruction.used if not known >> register & 1)
                if instruction.predicate is None:
                    for register in instruction.written:
                        known |= 1 << register
        return found

    def discarded(self, one: Instruction) -> set[int]:
        """Registers that a mov packs, in parts that every mov which unpacks them drops: LLVM leaves such undefined."""
        if one.base != "mov" or one.sources[0].form != "vector":
            return set()
        parts, kept = one.sources[0].value, set()
        for reader in (other for other in self.instructions if one.written[0] in other.used):
            taken = reader.results[0].value if reader.base == "mov" and reader.results[0].form == "vector" else ()
            if len(taken) != len(parts):
                return set()
            kept.update(part for part, into in zip(parts, taken, strict=True) if into.form != "sink")
        return set(registers_of(parts)) - set(registers_of(kept))

    @cached_property
    def running_before(self) -> list[frozenset[tuple[int, bool]]]:
        """By block: the registers of wgmmas that may still run at its start, as `guarded_after` has them."""
        return self._may_hold(frozenset(), guarded_after)

    @cached_property
    def unfenced_before(self) -> list[frozenset[int]]:
        """By block: the registers of wgmmas that others may have read or written since the last wgmma.fence."""
        return self._may_hold(self.guarded, self.unfenced_after)

    def held_before(self, number: int) -> tuple[frozenset[tuple[int, bool]], frozenset[int]]:
        """`running_before` and `unfenced_before` of a block."""
        return self.running_before[number], self.unfenced_before[number]

    @cached_property
    def guarded(self) -> frozenset[int]:
        """The registers of all wgmmas."""
        products = (one for one in self.instructions if one.base == "wgmma" and one.parts[1] == "mma_async")
        return frozenset().union(*map(guarded_by, products))

    def unfenced_after(self, instruction: Instruction, unfenced: frozenset[int]) -> frozenset[int]:
        """`unfenced_before`, from instruction to instruction."""
        if instruction.base != "wgmma":
            return unfenced | self.guarded.intersection([*instruction.used, *instruction.written])
        return frozenset() if instruction.parts[1] == "fence" else unfenced

    def _may_hold(self, at_entry: frozenset, step: Callable) -> list[frozenset]:
        """Sets at the start of blocks, united over all paths: the least fixed point of step(instruction, set)."""
        before = [at_entry] + [frozenset()] * (len(self.blocks) - 1)
        after: dict[int, frozenset] = {}
        changed = True
        while changed:
            changed = False
            for number, predecessors in enumerate(self.predecessors):
                united = before[number].union(*(after.get(predecessor, ()) for predecessor in predecessors))
                if number not in after or united != before[number]:
                    before[number], after[number], changed = united, self._after(number, united, step), True
        return before

    def _after(self, number: int, held: frozenset, step: Callable) -> frozenset:
        block = self.blocks[number]
        for instruction in self.instructions[block.start : block.end]:
            held = step(instruction, held)
        return held

    @cached_property
    def predecessors(self) -> list[list[int]]:
        result = [[] for _ in self.blocks]
        for number, block in enumerate(self.blocks):
            if block.exit == "branch":
                result[block.target].append(number)
            elif block.exit == "switch":
                for target in set(block.target):
                    result[target].append(number)
            falls = block.exit in ("fall", "barrier") or (block.exit != "switch" and block.register is not None)
            if falls and number + 1 < len(self.blocks):
                result[number + 1].append(number)
        return result

    def _end_with_return(self) -> None:
        if self.instructions and not self.instructions[-1].falls_through:
            return
        line = self.instructions[-1].line if self.instructions else 0
        end = Instruction("ret", "ret (end of body)", line, None)
        end.complete(len(self.instructions))
        self.instructions.append(end)

    def _starts(self) -> set[int]:
        count = len(self.instructions)
        behind = {instruction.index + 1 for instruction in self.instructions if instruction.ends_block}
        named = {label for one in self.instructions if one.base == "bra" for label in one.target}
        named |= {(1, label) for table in self.kernel.tables.values() for label in table}
        targets = {at for label, at in self.kernel.labels.items() if label in named}
        resized = {at for one in self.instructions if one.base == "setmaxnreg" for at in (one.index, one.index + 1)}
        return {0} | {at for at in targets | behind | resized if at < count}

    def _block(self, start: int, end: int, block_of_label: dict) -> Block:
        last = self.instructions[end - 1]
        leaves_by, target = "fall", None
        if last.base == "bra":
            label = next(label for label in last.target if label in block_of_label)
            leaves_by, target = "branch", block_of_label[label]
        elif last.base == "brx":
            table = self.kernel.tables[last.operands[1].value]
            targets = [block_of_label[1, label] for label in table]
            return Block(start, end, "switch", targets, last.operands[0].value, False)
        elif last.base in ("ret", "exit"):
            leaves_by = "return"
        elif last.is_barrier:
            leaves_by = "barrier"
        conditional = leaves_by in ("branch", "return")
        register = last.predicate if conditional else None
        return Block(start, end, leaves_by, target, register, conditional and last.predicate_negated)

    def _written(self, number: int) -> int:
        """Bit set of the registers that a block writes whatever its predicates."""
        block, registers = self.blocks[number], 0
        for instruction in self.instructions[block.start : block.end]:
            if instruction.predicate is None:
                for register in instruction.written:
                    registers |= 1 << register
        return registers

    def _written_before(self, written: list[int]) -> list[int]:
        """Bit sets of the registers written on every path to a block: the greatest fixed point."""
        everything = (1 << len(self.kernel.register_sizes)) - 1
        before = [0] + [everything] * (len(written) - 1)
        after = [written[0]] + [everything] * (len(written) - 1)
        changed = True
        while changed:
            changed = False
            for number in range(1, len(written)):
                known = everything
                for predecessor in self.predecessors[number]:
                    known &= after[predecessor]
                if (known, known | written[number]) != (before[number], after[number]):
                    before[number], after[number], changed = known, known | written[number], True
        return before


def guarded_by(instruction: Instruction) -> frozenset[int]:
    """The registers that a wgmma uses until it is waited for: D, and A where A lies in registers."""
    d, a = instruction.operands[:2]
    return frozenset(registers_of([d, a] if a.form == "vector" else [d]))


def guarded_after(instruction: Instruction, running: frozenset[tuple[int, bool]]) -> frozenset[tuple[int, bool]]:
    """The registers of wgmmas that may run behind an instruction, given those before it, each with whether a
    wgmma.commit_group may have closed its group: wgmma.wait_group waits for no other."""
    if instruction.base != "wgmma":
        return running
    action = instruction.parts[1]
    if action == "mma_async":
        return running | {(register, False) for register in guarded_by(instruction)}
    if action == "commit_group":
        return frozenset((register, True) for register, _ in running)
    waits_for_all = action == "wait_group" and instruction.operands[0].value == 0
    return frozenset(one for one in running if not one[1]) if waits_for_all else running
