"""Python expressions for operands: reading registers and constants as numbers, writing results back."""

from __future__ import annotations

from itertools import count

import numpy as np
from numpy import float32 as f4
from numpy import float64 as f8
from numpy import uint64 as u8

from . import arithmetic, types
from .instruction import Operand
from .parse import Kernel
from .types import CODECS, RAW, TYPES

_DTYPES = ("i1", "i2", "i4", "i8", "u1", "u2", "u4", "u8", "f2", "f4", "f8")


class Operands:
    """Names in the generated code: m the machine, R its registers, S the special registers, mask, K<n> constants.

    `act` is the name of the mask that an instruction runs under, None where all lanes do.
    """

    def __init__(self, kernel: Kernel, symbols: dict[str, int], doubtful: set[int]) -> None:
        self.kernel, self.symbols, self.doubtful = kernel, symbols, doubtful
        self.names = {"np": np} | {name: np.dtype(name).type for name in _DTYPES}
        for module in (types, arithmetic):
            self.names |= {name: value for name, value in vars(module).items() if not name.startswith("__")}
        self.numbers = count(1)  # of the constants
        self.specialised = any(one.base == "setmaxnreg" for one in kernel.instructions)

    def constant(self, value) -> str:
        name = f"K{next(self.numbers)}"
        self.names[name] = value
        return name

    def read(self, operand: Operand, type_name: str) -> str:
        """A source operand as numbers of a type."""
        dtype, size, encoding = TYPES[type_name]
        if operand.form == "special":
            return f"S['{operand.value}']"
        if operand.form == "symbol":
            return self.constant(RAW[size](self.symbols[operand.value]))
        if operand.form != "register":
            return self._literal(operand, type_name)
        value, register_size = f"R[{operand.value}]", self.kernel.register_sizes[operand.value]
        if encoding == "predicate":
            return f"(~{value})" if operand.negated else value
        if register_size != size:
            value += f".astype(u{size})"
        return CODECS[encoding][0].format(value=value, dtype=dtype)

    def _literal(self, operand: Operand, type_name: str) -> str:
        dtype, size, encoding = TYPES[type_name]
        if operand.form not in ("integer", "float32", "float64"):
            raise NotImplementedError
        if encoding == "predicate":
            return self.constant(np.bool_(operand.value))
        if operand.form == "float64":
            bits = u8(operand.value)
            bits = f4(bits.view(f8)).view("u4") if size == 4 else bits
        else:
            bits = RAW[size](operand.value & ((1 << 8 * size) - 1))
        number = eval(CODECS[encoding][0].format(value="bits", dtype=dtype), self.names, {"bits": bits})
        return self.constant(number)

    def write(
        self, operand: Operand, expression: str, type_name: str, act: str | None, full: bool = False
    ) -> list[str]:
        """Lines that write numbers of a type to a register; full: the expression has one element per lane."""
        if operand.form == "sink":
            return []
        _, size, encoding = TYPES[type_name]
        register, register_size = operand.value, self.kernel.register_sizes[operand.value]
        value = CODECS[encoding][1].format(value=expression, size=size)
        if register_size != size:
            narrow = f".view(i{size}).astype(i{register_size}).view(u{register_size})"
            value = f"({value}){narrow}" if encoding == "signed" else f"({value}).astype(u{register_size})"
        if not full and "R[" not in value:
            value = f"np.full(m.lanes,{value})"
        lines = [f"R[{register}]=" + (value if act is None else f"np.where({act},{value},R[{register}])")]
        if register in self.doubtful:
            lines.append(f"m.define({register},{'None' if act is None else f'np.flatnonzero({act})'})")
        return lines

    def address(self, operand: Operand, type_name: str | None = None) -> str:
        """The address of a memory operand, 64 bits where it is not said or seen otherwise."""
        base, offset = operand.value, operand.offset
        if type_name is None:
            narrow = base.form == "register" and self.kernel.register_sizes[base.value] == 4
            type_name = "b32" if narrow else "b64"
        raw = RAW[TYPES[type_name].size]
        if base.form in ("symbol", "integer"):
            start = self.symbols[base.value] if base.form == "symbol" else base.value
            return f"np.full(m.lanes,{self.constant(raw(start + offset))})"
        expression = self.read(base, type_name)
        if not offset:
            return expression
        return f"{expression}+{self.constant(raw(offset & ((1 << 8 * TYPES[type_name].size) - 1)))}"

    def register_or_none(self, operand: Operand) -> int | None:
        return operand.value if operand.form == "register" else None


def elements(operand: Operand) -> list[Operand]:
    """The parts of a vector or pair; else the operand itself."""
    return operand.value if operand.form in ("vector", "pair") else [operand]


def raw_type(type_name: str) -> str:
    """The untyped bits of a type: b32 of f32."""
    return "pred" if type_name == "pred" else f"b{8 * TYPES[type_name].size}"
