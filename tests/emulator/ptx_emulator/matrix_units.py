"""mma.sync: small matrix products of a warp's registers, many at a time."""

from __future__ import annotations

import collections
import re

import numpy as np
from numpy import float16 as f2
from numpy import float32 as f4
from numpy import int32 as i4
from numpy import uint32 as u4

from .instruction import Instruction, Operand
from .types import decode_operand, to_half

_SHAPE = re.compile(r"m16n8k\d+$")
_ACCUMULATORS, _ELEMENTS = ("f32", "f16", "s32"), ("f16", "bf16", "tf32", "s8", "u8")


class _Product:
    """D = C + A @ B by registers; a constant operand is a tuple of its bits."""

    def __init__(self, instruction: Instruction) -> None:
        self.d, self.a, self.b, self.c = map(_registers, instruction.operands[:4])
        self.level = 0


class ProductGroup:
    """mma instructions of one shape and type, without any other instruction between that touches their registers.

    levels   products in the order of their dependences, those with the same A together: [[(A, [product, ...]), ...]]
    """

    def __init__(self, instruction: Instruction) -> None:
        parts = instruction.parts
        shape = next(i for i, part in enumerate(parts) if _SHAPE.match(part))
        self.variant = tuple(parts[shape:])
        self.accumulator, self.element = parts[-1], parts[-3]
        if self.accumulator not in _ACCUMULATORS or self.element not in _ELEMENTS or "sp" in parts:
            raise NotImplementedError
        self.instructions: list[Instruction] = []
        self.written: set[int] = set()
        self.used: set[int] = set()
        self._factors: set[int] = set()
        self._products: list[_Product] = []

    def takes(self, instruction: Instruction, variant: tuple) -> bool:
        """True where another mma may join: no factor of either is a result of the other."""
        factors = {register for operand in instruction.operands[1:3] for register in _registers(operand)}
        return variant == self.variant and not self.written & factors and not self._factors & set(instruction.written)

    def separates(self, instruction: Instruction) -> bool:
        """True where an instruction touches registers of the group, so that the group must run before it."""
        touched = set(instruction.used) | set(instruction.written)
        return bool(self.written & touched or self.used & set(instruction.written))

    def add(self, instruction: Instruction) -> None:
        product = _Product(instruction)
        touched = set(product.c) | set(product.d)
        product.level = 1 + max(
            (one.level for one in self._products if touched & set(one.d) or set(product.d) & set(one.c)), default=-1
        )
        self._products.append(product)
        self.instructions.append(instruction)
        self.written |= set(product.d)
        self._factors |= set(product.a) | set(product.b)
        self.used |= set(instruction.used)

    def close(self) -> ProductGroup:
        levels = collections.defaultdict(lambda: collections.defaultdict(list))
        for product in self._products:
            levels[product.level][product.a].append(product)
        self.levels = [list(levels[level].items()) for level in sorted(levels)]
        return self


class MatrixUnits:
    def multiply(self, group: ProductGroup, registers, mask=None) -> None:
        """D = C + (A @ B): exact products, their sum over one instruction's K in float32, one float32 addition of C."""
        self.require_whole(group.instructions[0], mask)
        warps, left_factors, right_factors = self.lanes // 32, {}, {}
        for level in group.levels:
            for a_registers, products in level:
                a = left_factors.get(a_registers)
                if a is None:
                    a = left_factors[a_registers] = left_fragment(
                        np.stack([registers[one] for one in a_registers]), warps, group.element
                    )
                b_registers = tuple(product.b for product in products)
                b = right_factors.get(b_registers)
                if b is None:
                    b = right_factors[b_registers] = _right_fragment(
                        np.stack([registers[one] for part in b_registers for one in part]),
                        warps,
                        len(products),
                        group.element,
                    )
                c = np.stack([self._bits(registers, one) for product in products for one in product.c])
                results = self._accumulate(group.accumulator, c, np.matmul(a, b.transpose(0, 2, 1)), len(products))
                for product, values in zip(products, results, strict=True):
                    for register, value in zip(product.d, values, strict=True):
                        self.write_result(registers, register, value, mask)

    def _accumulate(self, accumulator: str, c, product, count: int):
        """Raw D registers [count, registers, lanes] of raw C and products [warps, 16 rows, 8 * count columns]."""
        warps = self.lanes // 32
        product = product.reshape(warps, 2, 8, count, 4, 2).transpose(3, 1, 5, 0, 2, 4)
        if accumulator == "f32":
            result = np.empty((count, 2, 2, warps, 8, 4), f4)
            np.add(c.view(f4).reshape(result.shape), product, out=result)
            return result.view(u4).reshape(count, 4, -1)
        if accumulator == "s32":
            return (c.reshape(count, 2, 2, warps, 8, 4) + product.astype(i4).view(u4)).reshape(count, 4, -1)
        pairs = c.view(f2).reshape(count, 2, warps, 8, 4, 2).astype(f4) + product.transpose(0, 1, 3, 4, 5, 2)
        return to_half(np.ascontiguousarray(pairs)).view(u4).reshape(count, 2, -1)

    def _bits(self, registers, register):
        return registers[register] if isinstance(register, int) else np.full(self.lanes, u4(register[0]))

    def write_result(self, registers, register: int, value, mask) -> None:
        registers[register] = value if mask is None else np.where(mask, value, registers[register])
        if register in self.doubtful:
            self.define(register, None if mask is None else np.flatnonzero(mask))


def left_fragment(bits, warps: int, element: str):
    """A [warps, 16, K] of raw registers: register 2j + i of lane 4g + t holds row g + 8i, part t of columns j."""
    values = decode_operand(bits, element)
    count, each = values.shape[0], values.shape[-1]
    values = values.reshape(count // 2, 2, warps, 8, 4, each).transpose(2, 1, 3, 0, 4, 5)
    return np.ascontiguousarray(values).reshape(warps, 16, -1)


def _right_fragment(bits, warps: int, count: int, element: str):
    """Transposed B [warps, 8 * count, K] of raw registers: register j of lane 4g + t: column g, part t of rows j."""
    values = decode_operand(bits, element)
    values = values.reshape(count, -1, warps, 8, 4, values.shape[-1]).transpose(2, 0, 3, 1, 4, 5)
    return np.ascontiguousarray(values).reshape(warps, count * 8, -1)


def _registers(operand: Operand) -> tuple:
    parts = operand.value if operand.form == "vector" else [operand]
    return tuple(part.value if part.form == "register" else (part.value,) for part in parts)
