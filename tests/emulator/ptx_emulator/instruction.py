"""One PTX instruction: operands, registers that it reads and writes, the class it is counted under."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import NamedTuple

from .types import TYPES

# Instructions without a destination.
_NO_RESULT = {
    "st", "stmatrix", "red", "cp", "bar", "barrier", "bra", "ret", "exit", "fence", "membar", "trap", "prefetch",
    "discard", "call", "nanosleep", "brkpt", "griddepcontrol", "tensormap", "wgmma.fence", "wgmma.commit_group",
    "wgmma.wait_group", "setmaxnreg", "brx", "mbarrier.init", "mbarrier.inval", "mbarrier.expect_tx",
}  # fmt: skip
_CLASSES = {
    "ldmatrix": "ldmatrix", "stmatrix": "stmatrix", "cvt": "cvt", "mov": "mov", "shfl": "shfl",
    "tensormap": "tensormap", "mbarrier": "mbarrier",
    **dict.fromkeys(("vote", "redux", "match", "activemask"), "vote/redux"),
    **dict.fromkeys(("bar", "barrier", "fence", "membar"), "bar"),
    **dict.fromkeys(("bra", "brx", "ret", "exit", "call", "trap"), "branch"),
    **dict.fromkeys(("setp", "selp", "set", "slct"), "setp/selp"),
    **dict.fromkeys(("ex2", "lg2", "rcp", "rsqrt", "sqrt", "sin", "cos", "tanh"), "mufu"),
}  # fmt: skip
_CLASS_OF_TYPE = {
    "pred": "setp/selp", "f64": "fp64", **dict.fromkeys(("f32", "f32x2"), "fp32"),
    **dict.fromkeys(("f16", "bf16", "f16x2", "bf16x2"), "fp16"),
}  # fmt: skip
_ENDS = ("ret", "exit", "bra", "brx", "trap")


class Operand(NamedTuple):
    """Value by form: the number of a "register", an "integer", the bits of a "float32" or "float64", the name of a
    "symbol" or "special" register, the base operand of a "memory" operand, the operands of a "vector" or "pair", a
    memory operand and coordinates of a "tensor", nothing of a "sink"."""

    form: str
    value: object = None
    offset: int = 0
    negated: bool = False


def registers_of(operands: Iterable[Operand]) -> Iterator[int]:
    """The registers that operands name, addresses included."""
    for operand in operands:
        if operand.form == "register":
            yield operand.value
        elif operand.form == "memory":
            yield from registers_of([operand.value])
        elif operand.form in ("vector", "pair", "tensor"):
            yield from registers_of(operand.value)


class Instruction:
    """parts of the opcode ("ld", "global", "b32"); operands; predicate: a register or None; line and text in the PTX,
    loc in the source; registers written and used; index in the kernel."""

    def __init__(self, opcode: str, text: str, line: int, loc: tuple | None) -> None:
        self.opcode, self.text, self.line, self.loc = opcode, text, line, loc
        self.parts = opcode.split(".")
        self.base = self.parts[0]
        self.predicate: int | None = None
        self.predicate_negated = False
        self.operands: list[Operand] = []
        self.target = None  # of a branch: possible labels, innermost scope first; then the label itself
        self.index = -1

    def complete(self, index: int) -> None:
        """Derive what depends on the operands."""
        self.index = index
        has_result = not {self.base, ".".join(self.parts[:2])} & _NO_RESULT
        self.results, self.sources = self.operands[:has_result], self.operands[has_result:]
        self.written = list(registers_of(self.results))
        self.used = list(registers_of(self.sources))
        if self.predicate is not None:
            self.used.append(self.predicate)
        self.counted_as = _class_of(self)

    def left_out(self) -> Instruction:
        """One that does nothing instead of it."""
        nothing = Instruction("nop", f"left out: {self.text}", self.line, self.loc)
        nothing.complete(self.index)
        return nothing

    @property
    def is_barrier(self) -> bool:
        """A barrier of the CTA."""
        return self.base in ("bar", "barrier") and "warp" not in self.parts

    @property
    def ends_block(self) -> bool:
        return self.base in _ENDS or self.is_barrier

    @property
    def falls_through(self) -> bool:
        """True where control may go on behind it."""
        return self.base not in _ENDS or self.predicate is not None

    def names(self, space: str) -> bool:
        """True where the opcode names this state space, as in ld.shared::cta."""
        return any(part == space or part.startswith(space + "::") for part in self.parts)

    def one_of(self, *names: str) -> str:
        """The part of the opcode that is among these; raises StopIteration where there is none."""
        return next(part for part in self.parts if part in names)


def access_width(instruction: Instruction) -> int:
    """Bytes that one thread moves with this memory instruction; 0 where it moves none."""
    if instruction.base in ("ldmatrix", "stmatrix"):
        return 16
    if instruction.base == "mbarrier":
        return 8
    if instruction.base == "cp":
        sources = instruction.sources
        return sources[2].value if len(sources) > 2 and sources[2].form == "integer" else 0
    last = instruction.parts[-1]
    if last not in TYPES:
        return 16 if last == "b128" else 0
    return TYPES[last].size * vector_length(instruction)


def vector_length(instruction: Instruction) -> int:
    return next((n for n in (2, 4, 8) if f"v{n}" in instruction.parts), 1)


def _class_of(instruction: Instruction) -> str:
    base, parts, last = instruction.base, instruction.parts, instruction.parts[-1]
    if base == "mma" or (base == "wgmma" and parts[1] == "mma_async"):
        return "tensor"
    if base in ("ld", "ldu", "st"):
        if base != "st" and "param" in parts:
            return "ld.param"
        if "local" in parts:
            return "local"
        return f"{base[:2]}.{'shared' if instruction.names('shared') else 'global'}"
    if base in ("atom", "red"):
        return f"atom.{'shared' if instruction.names('shared') else 'global'}"
    if base == "cp":
        if "bulk" in parts:
            return "tma" if "tensor" in parts else "cp.async.ctl"
        return "cp.async" if len(parts) > 3 else "cp.async.ctl"
    if base == "div" and last[0] == "f":
        return "mufu"
    return _CLASSES.get(base) or _CLASS_OF_TYPE.get(last, "int")
