"""Atomic operations: lanes that share an address act one after the other, in thread order."""

from __future__ import annotations

import numpy as np
from numpy import float16 as f2
from numpy import float32 as f4

from .access import Access
from .types import (
    RAW,
    TYPES,
    from_bfloat,
    from_bfloat_pair,
    from_half_pair,
    to_bfloat,
    to_bfloat_pair,
    to_half,
    to_half_pair,
)


def _on_numbers(type_name: str, function, old, value):
    """function(old, value) on the numbers that raw bits of a PTX type stand for."""
    if type_name == "f16x2":
        return to_half_pair(function(from_half_pair(old), from_half_pair(value)))
    if type_name == "bf16x2":
        return to_bfloat_pair(function(from_bfloat_pair(old), from_bfloat_pair(value)))
    if type_name == "f16":
        return to_half(function(old.view(f2).astype(f4), value.view(f2).astype(f4)))
    if type_name == "bf16":
        return to_bfloat(function(from_bfloat(old), from_bfloat(value)))
    dtype = TYPES[type_name].dtype
    return function(old.view(dtype), value.view(dtype)).view(old.dtype)


def _increment(old, limit):
    return np.where(old >= limit, old * 0, old + old.dtype.type(1))


def _decrement(old, limit):
    return np.where((old == 0) | (old > limit), limit, old - old.dtype.type(1))


# (memory, value, second value, type) -> new memory, all raw bits
OPERATIONS = {
    "add": lambda old, value, _, type_name: _on_numbers(type_name, np.add, old, value),
    "min": lambda old, value, _, type_name: _on_numbers(
        type_name, np.fmin if "f" in type_name else np.minimum, old, value
    ),
    "max": lambda old, value, _, type_name: _on_numbers(
        type_name, np.fmax if "f" in type_name else np.maximum, old, value
    ),
    "and": lambda old, value, *_: old & value,
    "or": lambda old, value, *_: old | value,
    "xor": lambda old, value, *_: old ^ value,
    "exch": lambda old, value, *_: value,
    "cas": lambda old, value, second, _: np.where(old == value, second, old),
    "inc": lambda old, value, *_: _increment(old, value),
    "dec": lambda old, value, *_: _decrement(old, value),
}


class Atomics:
    def atomic(self, access: Access, registers, address, value, second, mask) -> None:
        """atom and red: memory = operation(memory, value, second); the old memory goes to the access's register."""
        active = self.select(mask)
        if active is not None:
            address, value, second = (_pick(operand, active) for operand in (address, value, second))
        count = len(address)
        if not count:
            return
        value = np.broadcast_to(value, count)
        second = None if second is None else np.broadcast_to(second, count)
        memory, at = self._atomic_memory(access, address, active)
        operation, old = OPERATIONS[access.operation], np.empty(count, memory.dtype)
        for lanes in _turns(at):
            before = memory[at[lanes]]
            old[lanes] = before
            other = None if second is None else second[lanes]
            memory[at[lanes]] = operation(before, value[lanes], other, access.type)
        if access.registers and access.registers[0] is not None:
            self.put(access, registers, 0, old, active)

    def _atomic_memory(self, access: Access, address, active):
        width, instruction = access.size, access.instruction
        if access.space == "global":
            flat = self.global_offsets(instruction, address, width, active)
            self.count_sectors(access, address, active)
            memory = self.global_rows(RAW[width], 1)[:, 0]
        else:
            flat = self.shared_offsets(instruction, address, width, active)
            fresh = self.shared_shadow.writer[self.shared_cells(flat, width)] == 0
            if fresh.any():
                what = "atomic on uninitialised shared memory"
                self.uninitialised(instruction, ("shared",), what, int(fresh.sum()))
            memory = self.shared_rows(RAW[width], 1)[:, 0]
        self.check_write(access.space, instruction, flat, width, active, atomic=True)
        return memory, flat // width


def _turns(at) -> list:
    """Positions in groups without a repeated address: first all first users of an address, then all second ones, ..."""
    order = np.argsort(at, kind="stable")
    ordered = at[order]
    first = np.r_[True, ordered[1:] != ordered[:-1]]
    position = np.arange(len(at))
    rank = position - np.maximum.accumulate(np.where(first, position, 0))
    return [order[rank == turn] for turn in range(int(rank.max()) + 1)]


def _pick(operand, active):
    return operand if operand is None or np.ndim(operand) == 0 else operand[active]
