"""Lanes that read one address of shared memory: traced back through the machine code that computes it."""

from __future__ import annotations

import functools
import itertools
import operator
import re
from bisect import bisect_left, bisect_right
from collections.abc import Callable

from .control_flow import Instruction, Listing, blocks_of

_ALL = 0xFFFFFFFF
_REGISTER = re.compile(r"(?<!\w)R(\d+)(\.64)?")
_PREDICATE = re.compile(r"(?<!\w)P\d")
# Their result at a lane depends on the lane, and not on operands alone.
_OF_LANES = ("ELECT", "SHFL", "LDSM", "LDL", "LDTM", "HMMA", "HGMMA", "MATCH", "ATOM", "ATOMS", "ATOMG")
_SUMS = ("IADD3", "IADD", "VIADD", "LEA", "IMAD")


class Lanes:
    """Follows values of registers back to the lane that computed them.

    Definitions that reach an instruction are found along the control flow. Branches are taken to be the same for all
    lanes, and products never to be addresses. Whatever is not known is taken to differ among lanes.
    """

    def __init__(self, listing: Listing) -> None:
        self._code = listing.instructions
        self._blocks, self._predecessors = blocks_of(listing)
        self._starts = sorted(self._blocks)
        self._writers: dict[str, list[int]] = {}
        for index, instruction in enumerate(listing.instructions):
            for name in _written(instruction):
                self._writers.setdefault(name, []).append(index)

    def read_in_pairs(self, index: int) -> bool:
        """Return whether lanes n and n ^ 1 of a load read one address for every n, or lanes n and n ^ 2."""
        return any(not self._differing(index, self._code[index].operands, lane) for lane in (0, 1))

    def _differing(self, index: int, operands: str, lane: int) -> bool:
        """Return whether registers that operands name may differ between lanes n and n ^ (1 << lane)."""
        wanted = _names(operands.partition(",")[2])
        pending, sources = [(index, name) for name in wanted], {}
        while pending:
            if (one := pending.pop()) not in sources:
                sources[one] = self._definitions(*one)
                pending += [(at, name) for at in sources[one] for name in _read(self._code[at])]
        bits = dict.fromkeys((at for found in sources.values() for at in found), 0)

        def bits_of(at: int, name: str) -> int:
            return (
                functools.reduce(operator.or_, (bits[one] for one in sources[at, name])) if sources[at, name] else _ALL
            )

        before: dict[int, int] = {}
        while before != bits:
            before = dict(bits)
            for at in bits:
                bits[at] |= _result(self._code[at], functools.partial(bits_of, at), 1 << lane)
        return any(bits_of(index, name) for name in wanted)

    def _definitions(self, index: int, name: str) -> list[int]:
        """Find the instructions that may have written a register which an instruction reads."""
        found, seen = [], set()
        writers = self._writers.get(name, [])
        pending = [(self._starts[bisect_right(self._starts, index) - 1], index)]
        while pending:
            start, end = pending.pop()
            for at in reversed(writers[bisect_left(writers, start) : bisect_left(writers, end)]):
                found.append(at)
                if not self._code[at].predicate:
                    break
            else:
                before = self._predecessors[start] - seen
                seen |= before
                pending += [(block, self._blocks[block]) for block in before]
        return found


def _names(text: str) -> list[str]:
    """Name the registers and predicates of a text of operands."""
    found = _PREDICATE.findall(text)
    for number, is_pair in _REGISTER.findall(text):
        found += [f"R{int(number) + more}" for more in range(2 if is_pair else 1)]
    return found


def _split(instruction: Instruction) -> tuple[list[str], list[str]]:
    """Split operands into those that it writes and those that it reads."""
    tokens = re.split(r",\s*", instruction.operands)
    if instruction.name.startswith(("ST", "RED", "BRA", "BAR")):
        return [], tokens
    count = 2 if re.match(r"P[T\d]", tokens[0]) else 1
    if instruction.name in _SUMS:
        count += sum(bool(re.fullmatch(r"P[T\d]", token)) for token in tokens[1:3])
    return tokens[:count], tokens[count:]


def _written(instruction: Instruction) -> list[str]:
    parts = instruction.opcode.split(".")
    wide = {"128": 4, "64": 2, "WIDE": 2}
    count = 2 if parts[0] == "CS2R" and "32" not in parts else max(wide.get(part, 1) for part in parts)
    found = []
    for token in _split(instruction)[0]:
        if re.fullmatch(r"R\d+", token):
            found += [f"R{int(token[1:]) + more}" for more in range(count)]
        elif re.fullmatch(r"P\d", token):
            found.append(token)
    return found


def _read(instruction: Instruction) -> list[str]:
    return _names(" ".join((instruction.predicate, *_split(instruction)[1])))


def _upward(bits: int) -> int:
    """The bits to which a sum carries a difference."""
    return -(bits & -bits) & _ALL


def _result(instruction: Instruction, bits_of: Callable[[str], int], lane: int) -> int:
    """Find the bits of a result that may differ between two lanes whose numbers differ by the bit `lane`."""
    name, parts, tokens = instruction.name, instruction.opcode.split("."), _split(instruction)[1]
    if name == "S2R":
        return lane if tokens[0] in ("SR_TID.X", "SR_LANEID") else 0
    bits = {one: bits_of(one) for one in _read(instruction)}
    if name in _OF_LANES or any(found for one, found in bits.items() if one.startswith("P")):
        return _ALL
    given = [functools.reduce(operator.or_, map(bits.__getitem__, _names(token)), 0) for token in tokens]
    if not any(given):
        return 0
    if name == "LOP3":
        return _logic(tokens, given)
    if name == "MOV" or parts[:2] == ["IMAD", "MOV"]:
        return given[-1]
    either = functools.reduce(operator.or_, given)
    if name in ("IADD3", "IADD", "VIADD"):
        return _upward(either)
    if name == "SEL":
        return either
    return _moved(name, parts, tokens, given)


def _moved(name: str, parts: list[str], tokens: list[str], given: list[int]) -> int:
    """The bits of a result of a shift or product by a constant that may differ; all of other instructions."""
    count = next((int(token, 16) for token in tokens[1:] if re.fullmatch(r"0x[0-9a-f]+", token)), None)
    if count is None:
        return _ALL
    if name == "SHF" and parts[1:3] == ["R", "U32"] and tokens[0] == "RZ":
        return given[2] >> count
    if name == "SHF" and parts[1:] == ["L", "U32"] and tokens[2] == "RZ":
        return given[0] << count & _ALL
    if name == "SGXT" and "U32" in parts:
        return given[0] & ((1 << count) - 1)
    if name == "LEA" and len(parts) == 1:
        return _upward(given[0] << count & _ALL | given[1])
    if name == "IMAD" and tokens[1].startswith("0x") and not {"HI", "WIDE"} & set(parts):
        moved = given[0] * (count & -count) & _ALL
        return moved if count & (count - 1) == 0 and tokens[2] == "RZ" else _upward(moved | given[2])
    return _ALL


def _logic(tokens: list[str], given: list[int]) -> int:
    """The bits of a result of LOP3, whose table holds a result for each of the three operands' bits."""
    table, found = int(tokens[3], 16), 0
    constants = [0 if token == "RZ" else int(token, 16) if token.startswith("0x") else None for token in tokens[:3]]
    for bit in range(32):
        choices = [(0, 1) if one is None else (one >> bit & 1,) for one in constants]
        for values in itertools.product(*choices):
            entry = values[0] << 2 | values[1] << 1 | values[2]
            for operand, weight in enumerate((4, 2, 1)):
                if given[operand] >> bit & 1 and (table >> entry ^ table >> (entry ^ weight)) & 1:
                    found |= 1 << bit
    return found
