"""Instructions and loops of a listing by nvdisasm, and loops of the PTX behind it."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import NamedTuple

_INSTRUCTION = re.compile(r"^\s+/\*([0-9a-f]{4,})\*/\s+(?:\{\s*)?(@!?U?P\w+\s+)?([A-Z][\w.]*)\s*(.*?)\s*;")
_LABEL = re.compile(r"^(\.L_x?_?\w+):")
_TARGET = re.compile(r"\.L_x?_?\w+|\$L__BB\w+")
_JUMPS = ("BRA", "JMP", "bra")
_ENDS = ("EXIT", "RET", "KILL", "BPT", "ret")
_PTX_LABEL = re.compile(r"^(\$L__BB\w+):")
_PTX_INSTRUCTION = re.compile(
    r"^\s+(@!?%p\d+\s+)?((?:bra|ret|mma\.sync|wgmma\.mma_async|wgmma\.commit_group|tcgen05\.mma"
    r"|mbarrier\.arrive\.expect_tx)\b[\w.:]*)\s*(.*?)\s*;"
)
_PTX_MMA = re.compile(r"mma\.sync|wgmma\.mma_async|tcgen05\.mma")


class Instruction(NamedTuple):
    """An instruction as printed: address, predicate ("@P0 " or ""), full opcode ("HMMA.16816.F32.BF16"), operands."""

    address: int
    predicate: str
    opcode: str
    operands: str

    @property
    def name(self) -> str:
        return self.opcode.partition(".")[0]


class Listing(NamedTuple):
    """Instructions in order, and for each label the index of the instruction behind it."""

    instructions: list[Instruction]
    labels: dict[str, int]


@dataclass(frozen=True)
class Span:
    """A loop, as indices of instructions.

    body      from its first instruction to the last branch back to it: the instructions of an iteration
    indices   also the instructions that lie elsewhere and come back, such as the retries of a wait
    """

    body: tuple[int, ...]
    indices: frozenset[int]


def parse(listing: str) -> Listing:
    """Parse the instructions and labels of a listing by nvdisasm."""
    instructions: list[Instruction] = []
    labels: dict[str, int] = {}
    for line in listing.splitlines():
        if label := _LABEL.match(line):
            labels[label[1]] = len(instructions)
        elif found := _INSTRUCTION.match(line):
            instructions.append(Instruction(int(found[1], 16), found[2] or "", found[3], found[4]))
    return Listing(instructions, labels)


def parse_ptx(text: str) -> Listing:
    """Parse PTX: branches, MMAs, the ends of their groups, bytes expected of loads, and labels.

    An address is the number of the line.
    """
    instructions: list[Instruction] = []
    labels: dict[str, int] = {}
    for number, line in enumerate(text.splitlines(), 1):
        if label := _PTX_LABEL.match(line):
            labels[label[1]] = len(instructions)
        elif found := _PTX_INSTRUCTION.match(line):
            instructions.append(Instruction(number, found[1] or "", found[2], found[3]))
    return Listing(instructions, labels)


def loops(listing: Listing) -> list[Span]:
    """Find the natural loops, each closed by a branch back to a dominating block, ordered by their first instructions.

    Aho, Lam, Sethi, Ullman, Compilers, section 9.6. ptxas moves retries of waits out of line; their jump back closes no
    loop, since its target does not dominate it.
    """
    blocks, successors = _blocks(listing)
    predecessors = _reversed(successors)
    dominators = _dominators(list(blocks), successors, predecessors)
    latches: dict[int, list[int]] = {}
    for start, following in successors.items():
        for header in following & dominators.get(start, frozenset()):
            latches.setdefault(header, []).append(start)
    return [_span(header, latches[header], blocks, predecessors) for header in sorted(latches)]


def blocks_of(listing: Listing) -> tuple[dict[int, int], dict[int, set[int]]]:
    """Cut into basic blocks {start: end}; also return the starts of those that may come before each."""
    blocks, successors = _blocks(listing)
    return blocks, _reversed(successors)


def innermost(spans: list[Span], wanted: set[int]) -> list[Span]:
    """Select the loops that hold some of the wanted instructions, and no other such loop."""
    some = [span for span in spans if span.indices & wanted]
    return [span for span in some if not any(other.indices < span.indices for other in some)]


def ptx_loops(text: str) -> list[list[Instruction]]:
    """Return the instructions of `parse_ptx` in each innermost loop of PTX with MMAs, in order."""
    source = parse_ptx(text)
    spans = innermost(loops(source), {index for index, one in enumerate(source.instructions) if is_ptx_mma(one)})
    return [[source.instructions[index] for index in sorted(span.indices)] for span in spans]


def is_ptx_mma(instruction: Instruction) -> bool:
    return bool(_PTX_MMA.match(instruction.opcode))


def _span(header: int, latches: list[int], blocks: dict[int, int], predecessors: dict[int, set[int]]) -> Span:
    inside, pending = {header}, list(latches)
    while pending:
        block = pending.pop()
        if block not in inside:
            inside.add(block)
            pending.extend(predecessors[block])
    end = max(blocks[latch] for latch in latches)
    indices = {index for block in inside for index in range(block, blocks[block])}
    return Span(tuple(sorted(index for index in indices if header <= index < end)), frozenset(indices))


def _blocks(listing: Listing) -> tuple[dict[int, int], dict[int, set[int]]]:
    """Cut into basic blocks {start: end}; also return the starts that may follow each."""
    instructions, labels = listing
    count = len(instructions)
    leaders = {0, *(index for index in labels.values() if index < count)}
    follows: dict[int, set[int]] = {}
    for index, instruction in enumerate(instructions):
        targets = {labels[name] for name in _TARGET.findall(instruction.operands) if name in labels}
        targets = {target for target in targets if target < count}
        ends = _leaves(instruction)
        if targets or ends:
            follows[index] = targets if ends or index + 1 == count else targets | {index + 1}
            leaders |= follows[index] | ({index + 1} if index + 1 < count else set())
    starts = sorted(leaders)
    blocks = dict(zip(starts, [*starts[1:], count], strict=True))
    successors = {start: follows.get(end - 1, {end} if end < count else set()) for start, end in blocks.items()}
    return blocks, successors


def _reversed(successors: dict[int, set[int]]) -> dict[int, set[int]]:
    predecessors: dict[int, set[int]] = {start: set() for start in successors}
    for start, following in successors.items():
        for other in following:
            predecessors[other].add(start)
    return predecessors


def _leaves(instruction: Instruction) -> bool:
    """True where the next instruction in order never runs next."""
    if instruction.predicate:
        return False
    if instruction.name in _JUMPS:
        return instruction.operands.startswith(("`", "$"))  # else a predicate stands before the target
    return instruction.name in _ENDS


def _dominators(
    starts: list[int], successors: dict[int, set[int]], predecessors: dict[int, set[int]]
) -> dict[int, frozenset[int]]:
    """For each block that the entry reaches, find the blocks on every path to it, itself included."""
    entry, reached, pending = starts[0], {starts[0]}, [starts[0]]
    while pending:
        for other in successors[pending.pop()] - reached:
            reached.add(other)
            pending.append(other)
    order = [start for start in starts if start in reached]
    dominators = {start: frozenset(order) for start in order} | {entry: frozenset({entry})}
    changed = True
    while changed:
        changed = False
        for start in order[1:]:
            above = [dominators[other] for other in predecessors[start] if other in reached]
            now = frozenset.intersection(*above) | {start}
            if now != dominators[start]:
                dominators[start], changed = now, True
    return dominators
