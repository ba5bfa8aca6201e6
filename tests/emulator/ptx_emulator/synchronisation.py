"""Synchronising instructions of a kernel: how to leave one out, and why some are not missed."""

from __future__ import annotations

from collections.abc import Callable

from .flow import Flow, guarded_by
from .instruction import Instruction
from .parse import Kernel, parse


def operation_of(instruction: Instruction) -> str | None:
    """ "bar.sync", "cp.async.wait_group", "mbarrier.try_wait", ... of a synchronising instruction; None of another."""
    parts = instruction.parts
    if instruction.is_barrier:
        return "bar.sync"
    if parts[:2] == ["fence", "proxy"]:
        return "fence.proxy"
    if parts[0] == "mbarrier" or parts[:2] in (["wgmma", "fence"], ["wgmma", "commit_group"], ["wgmma", "wait_group"]):
        return ".".join(parts[:2])
    if parts[:2] == ["cp", "async"]:
        return next((f"cp.async.{name}" for name in ("commit_group", "wait_group") if name in parts), None)
    return None


def left_out(kernel: Kernel, instruction: Instruction) -> tuple[int, ...]:
    """The indices that `run(..., without=)` takes: of an instruction, and with a wait for an mbarrier of the branch
    back to it."""
    if operation_of(instruction) != "mbarrier.try_wait":
        return (instruction.index,)
    branch = kernel.instructions[instruction.index + 1]
    assert branch.base == "bra"
    assert branch.predicate in instruction.written
    return instruction.index, branch.index


class Order:
    """The order of the synchronising instructions of a kernel, and the instructions between them."""

    def __init__(self, ptx: str) -> None:
        self.flow = Flow(parse(ptx))
        self.instructions = self.flow.instructions
        count = len(self.instructions)
        self.before: list[list[int]] = [[index - 1] if index else [] for index in range(count)]
        for block, predecessors in zip(self.flow.blocks, self.flow.predecessors, strict=True):
            self.before[block.start] = [self.flow.blocks[number].end - 1 for number in predecessors]
        self.behind: list[list[int]] = [[] for _ in range(count)]
        for index, earlier in enumerate(self.before):
            for one in earlier:
                self.behind[one].append(index)

    def stretch(
        self, start: Instruction, forward: bool, ends: Callable[[Instruction], bool]
    ) -> tuple[list[Instruction], list[Instruction]]:
        """The instructions that lie between `start` and the first that `ends` on every path, and the latter."""
        neighbours = self.behind if forward else self.before
        seen, left, passed, reached = set(), list(neighbours[start.index]), [], []
        while left:
            index = left.pop()
            if index in seen:
                continue
            seen.add(index)
            one = self.instructions[index]
            if ends(one) and one.predicate is None:
                reached.append(one)
            else:
                passed.append(one)
                left += neighbours[index]
        return passed, reached

    def why_needless(self, one: Instruction) -> str | None:
        """Why the kernel may do without an instruction, by its text; None where only a run can tell."""
        operation = operation_of(one)

        def is_same(other: Instruction) -> bool:
            return operation_of(other) == operation

        if operation.endswith("commit_group"):
            _, reached = self.stretch(one, True, lambda other: _of_groups(other, one))
            if all(is_same(other) for other in reached):
                return "the next commit closes its group before anybody waits"
        if operation.endswith("wait_group"):
            started, _ = self.stretch(one, False, lambda other: is_same(other) and other.operands[0].value == 0)
            if not any(_starts(other, one) for other in started):
                return "everything was waited for before"
            ahead, _ = self.stretch(one, True, lambda other: is_same(other) and other.operands[0].value == 0)
            if operation == "wgmma.wait_group" and not _touched(ahead, by=started):
                return "the next wait comes before the registers are used"
        if operation == "fence.proxy":
            passed, _ = self.stretch(one, False, is_same)
            if not any(_writes_shared(other) for other in passed):
                return "no thread wrote to shared memory since the last fence"
            ahead, _ = self.stretch(one, True, is_same)
            if not any(_is_product(other) or (_copies_in_bulk(other) and other.base == "cp") for other in ahead):
                return "another fence comes before the asynchronous engine looks"
        if operation == "wgmma.fence":
            passed, ahead = (self.stretch(one, forward, is_same)[0] for forward in (False, True))
            if not _touched(passed, by=ahead):
                return "the registers of the next wgmmas were not used since the last fence"
        if operation == "bar.sync":
            sides = (self.stretch(one, forward, is_same)[0] for forward in (False, True))
            if not any(_writes_shared(other) or _copies_in_bulk(other) for side in sides for other in side):
                return "shared memory is only read on both sides"
        return None


def _touched(passed: list[Instruction], by: list[Instruction]) -> frozenset[int]:
    """The registers of the wgmmas among `by` that others among `passed` read or write."""
    guarded = frozenset().union(*(guarded_by(one) for one in by if _is_product(one)))
    used = (register for one in passed if one.base != "wgmma" for register in (*one.used, *one.written))
    return guarded.intersection(used)


def _of_groups(other: Instruction, one: Instruction) -> bool:
    """True where both are commits or waits of groups of the same engine."""
    operation = operation_of(other) or ""
    of_engine = operation.split(".")[0] == one.base and ("bulk" in other.parts) == ("bulk" in one.parts)
    return operation.endswith("_group") and of_engine


def _is_product(one: Instruction) -> bool:
    return one.base == "wgmma" and one.parts[1] == "mma_async"


def _starts(other: Instruction, wait: Instruction) -> bool:
    """True where this begins something that the wait could be for."""
    if wait.base == "wgmma":
        return _is_product(other)
    return other.base == "cp" and operation_of(other) is None and ("bulk" in other.parts) == ("bulk" in wait.parts)


def _writes_shared(one: Instruction) -> bool:
    """True where threads write to shared memory, at once or by a cp.async that arrives here."""
    if one.base in ("st", "atom", "red", "stmatrix"):
        return one.names("shared")
    return one.base == "cp" and "bulk" not in one.parts


def _copies_in_bulk(one: Instruction) -> bool:
    """True where this belongs to a bulk copy to or from shared memory."""
    return one.base == "mbarrier" or (one.base == "cp" and "bulk" in one.parts)
