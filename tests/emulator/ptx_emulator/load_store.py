"""Loads and stores of global, shared and local memory and of parameters."""

from __future__ import annotations

import numpy as np
from numpy import int64 as i8

from .access import Access
from .types import RAW


class LoadStore:
    """`registers` is the list of all registers; addresses and values have one element per lane."""

    def load(self, access: Access, registers, address, mask) -> None:
        active = self.select(mask)
        if active is not None:
            if not len(active):
                return
            address = address[active]
        rows, flat = self._locate(access, address, active)
        if access.space != "local":
            self.check_read(access.space, access.instruction, flat, access.width, active)
        data = rows[flat // access.width]
        for position in range(access.vector):
            self.put(access, registers, position, data[:, position], active)

    def store(self, access: Access, address, values, mask) -> None:
        active = self.select(mask)
        if active is not None:
            if not len(active):
                return
            address = address[active]
        data = np.empty((self.lanes if active is None else len(active), access.vector), access.element)
        for position, value in enumerate(values):
            data[:, position] = value if active is None or value.ndim == 0 else value[active]
        rows, flat = self._locate(access, address, active)
        at = flat // access.width
        old = rows[at]
        rows[at] = data
        if access.space != "local":
            self.check_write(access.space, access.instruction, flat, access.width, active, old, data, rows[at])

    def _locate(self, access: Access, address, active):
        """Memory as rows of the access's vectors, and the offset of each active lane; checked and counted."""
        width = access.width
        if access.space == "global":
            flat = self.global_offsets(access.instruction, address, width, active)
            self.count_sectors(access, address, active)
            rows = self.global_rows(access.element, access.vector)
        elif access.space == "shared":
            self.count_shared(access.instruction, address, active, width)
            flat = self.shared_offsets(access.instruction, address, width, active)
            rows = self.shared_rows(access.element, access.vector)
        else:
            flat = self._local_offsets(access, address, active)
            rows = self.local.view(access.element).reshape(-1, access.vector)
        return rows, flat

    def count_shared(self, instruction, address, active, width: int) -> None:
        """`count_wavefronts` of the active lanes' addresses."""
        if active is None:
            self.count_wavefronts(instruction, address, None, width)
            return
        every, mask = np.zeros(self.lanes, address.dtype), np.zeros(self.lanes, bool)
        every[active], mask[active] = address, True
        self.count_wavefronts(instruction, every, mask, width)

    def _local_offsets(self, access: Access, address, active):
        offset, size = address.astype(i8), self.kernel.local_size
        bad = ((offset & (access.width - 1)) != 0) | (offset + access.width > size)
        if bad.any():
            at = int(np.argmax(bad))
            what = f"local access of {access.width} bytes; the depot has {size}"
            self.fault(access.instruction, "out-of-bounds", active, at, int(offset[at]), what)
            offset = np.zeros_like(offset)
        return offset + (np.arange(self.lanes) if active is None else active) * self.local_stride

    def load_parameter(self, access: Access, registers, name: str, offset: int, mask) -> None:
        values = np.frombuffer(self.parameter_bytes[name][offset : offset + access.width], access.element)
        active = self.select(mask)
        count = self.lanes if active is None else len(active)
        for position in range(access.vector):
            self.put(access, registers, position, np.full(count, values[position]), active)

    def put(self, access, registers, position: int, value, active) -> None:
        """Write one element of a load to its register, extended to the register's size."""
        register = access.registers[position]
        if register is None:
            return
        size = self.kernel.register_sizes[register]
        raw = RAW[size]
        if value.dtype.itemsize != size:
            signed = getattr(access, "signed", False)
            value = value.view(f"i{value.dtype.itemsize}").astype(f"i{size}").view(raw) if signed else value.astype(raw)
        elif value.dtype != raw:
            value = value.view(raw)
        if active is None:
            registers[register] = np.ascontiguousarray(value)
        else:
            merged = registers[register].copy()
            merged[active] = value
            registers[register] = merged
        if register in self.doubtful:
            self.define(register, active)
