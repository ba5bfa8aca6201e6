"""Global memory: translation of addresses with their checks, and counters of requests and sectors."""

from __future__ import annotations

import numpy as np
from numpy import int64 as i8
from numpy import uint64 as u8

from .access import Access
from .buffers import SLOT_BITS, describe, poisoned, slot_address, slot_of
from .instruction import Instruction, access_width
from .shadow import Shadow
from .tensor_map import ELEMENT_TYPES

_SPACES = ("ld.global", "st.global", "atom.global", "cp.async")


class GlobalMemory:
    """All buffers lie in one array, `memory`, each from its `starts`; a flat offset is an index of a byte in it."""

    def build_global(self) -> None:
        """Lay out the buffers, once all are known."""
        size, self.starts = 0, []
        for buffer in self.buffers:
            self.starts.append(size)
            size += -(-max(len(buffer.data), 1) // 512) * 512 + 512
        self.memory = poisoned(size)
        for buffer, start in zip(self.buffers, self.starts, strict=True):
            self.memory[start : start + len(buffer.data)] = buffer.data
        self.memory_views = {}
        self.global_cell = self._smallest_global_access()
        self.global_shadow = Shadow(size // self.global_cell + 1, local=False)

    def _smallest_global_access(self) -> int:
        instructions = self.kernel.instructions
        widths = [access_width(one) for one in instructions if one.counted_as in _SPACES]
        if any(stores_tensor(one) for one in instructions):
            widths += self.descriptor_element_sizes
            widths += [
                ELEMENT_TYPES[one.operands[1].value].size
                for one in instructions
                if one.opcode.startswith("tensormap.replace.tile.elemtype")
            ]
        return min([width for width in widths if width] + [16])

    def write_back(self) -> None:
        """Hand the results to the host's tensors."""
        for buffer, start in zip(self.buffers, self.starts, strict=True):
            if buffer.writable:
                buffer.data[:] = self.memory[start : start + len(buffer.data)]

    def global_rows(self, dtype, vector: int):
        """The memory as rows of `vector` elements."""
        view = self.memory_views.get((dtype, vector))
        if view is None:
            whole = self.memory[: len(self.memory) // 16 * 16]
            view = self.memory_views[dtype, vector] = whole.view(dtype).reshape(-1, vector)
        return view

    def near(self, address: int) -> str:
        return describe(self.buffers, address)

    def near_offset(self, flat: int) -> str:
        """`near` of a flat offset."""
        slot = max(slot for slot in range(len(self.buffers)) if self.starts[slot] <= flat)
        return self.near(flat - self.starts[slot] + slot_address(slot))

    def global_offsets(self, instruction: Instruction, address, width: int, active):
        """Flat offsets of the addresses of the active lanes; faults where one is misaligned or out of bounds."""
        if width > 1:
            remainder = address & u8(width - 1)
            if remainder.any():
                at = int(np.flatnonzero(remainder)[0])
                what = f"{width}-byte access at an address that is not a multiple of {width}"
                self.fault(instruction, "misaligned", active, at, int(address[at]), what, self.near(int(address[at])))
                address = address - remainder
        signed = address.view(i8)
        slot = slot_of(int(signed[0]))
        if 0 <= slot < len(self.buffers):  # the usual case: one buffer, nothing wrong
            offset = signed - i8(slot_address(slot))
            if self._all_inside(slot, offset, width):
                return offset + self.starts[slot]
        return self._mixed_offsets(instruction, address, width, active)

    def _all_inside(self, slot: int, offset, width: int) -> bool:
        buffer = self.buffers[slot]
        if buffer.valid is None:
            return offset.min() >= buffer.spans[0].start and offset.max() + width <= buffer.spans[0].end
        if offset.min() < 0 or offset.max() + width > len(buffer.data):
            return False
        return all(buffer.valid[offset + byte].all() for byte in range(0, width, buffer.granularity))

    def _mixed_offsets(self, instruction: Instruction, address, width: int, active):
        signed = address.view(i8)
        flat, bad = np.zeros(len(address), i8), np.ones(len(address), bool)
        slots = (signed >> SLOT_BITS) - 1
        for slot in np.unique(slots[(slots >= 0) & (slots < len(self.buffers))]).tolist():
            buffer = self.buffers[slot]
            offset = signed - i8(slot_address(slot))
            span = buffer.spans[0]
            low, high = (span.start, span.end) if buffer.valid is None else (0, len(buffer.data))
            inside = (offset >= low) & (offset + width <= high)
            if buffer.valid is not None and inside.any():
                for byte in range(0, width, buffer.granularity):
                    inside[inside] &= buffer.valid[offset[inside] + byte]
            flat[inside] = offset[inside] + self.starts[slot]
            bad &= ~inside
        if bad.any():
            at = int(np.flatnonzero(bad)[0])
            what = f"{width}-byte {_verb(instruction)} by {bad.sum()} threads"
            self.fault(instruction, "out-of-bounds", active, at, int(address[at]), what, self.near(int(address[at])))
            flat[bad] = len(self.memory) - 512  # where faults are collected: bytes that nobody owns
        return flat

    def count_sectors(self, access: Access, address, active) -> None:
        """Requests of warps, the 32-byte sectors that they touch, bytes."""
        counters = self.report.requests[access.index]
        none = ~u8(0)
        if active is None:
            sectors = np.sort((address >> u8(5)).reshape(-1, 32), axis=1)
            requests, idle, lanes = len(sectors), 0, len(address)
        else:
            every = np.full(self.lanes, none)
            every[active] = address >> u8(5)
            sectors = np.sort(every.reshape(-1, 32), axis=1)
            requests, lanes = int(np.count_nonzero(sectors[:, 0] != none)), len(active)
            idle = int(np.count_nonzero(sectors[:, -1] == none))
        counters[0] += requests
        counters[1] += len(sectors) + int(np.count_nonzero(sectors[:, 1:] != sectors[:, :-1])) - idle
        counters[2] += lanes * access.width


def stores_tensor(instruction: Instruction) -> bool:
    """True where this is a bulk tensor store."""
    return instruction.counted_as == "tma" and instruction.operands[0].form == "tensor"


def _verb(instruction: Instruction) -> str:
    if instruction.base in ("st", "red") or stores_tensor(instruction):
        return "write"
    return "atomic" if instruction.base == "atom" else "read"
