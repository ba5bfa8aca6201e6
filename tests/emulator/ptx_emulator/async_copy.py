"""cp.async: copies from global to shared memory that arrive when the issuing thread waits for their group."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy import int64 as i8
from numpy import uint8 as u1
from numpy import uint64 as u8

from .access import Access


class _Copy(NamedTuple):
    """One instruction's copies under way, by lane: offset in shared memory, bytes, cells, number of the group."""

    access: Access
    lanes: np.ndarray
    flat: np.ndarray
    data: np.ndarray
    cells: np.ndarray
    group: np.ndarray

    def part(self, chosen) -> _Copy:
        return _Copy(self.access, *(field[chosen] for field in self[1:]))


class AsyncCopies:
    def start_async_copies(self) -> None:
        self.cp_async_copies: list[_Copy] = []
        self.cp_async_group = np.zeros(self.lanes, i8)

    def copy_async(self, access: Access, destination, source, size, mask) -> None:
        """size: bytes to copy, an array or None for all; zeros fill the rest of the destination."""
        active = self.select(mask)
        if active is not None:
            if not len(active):
                return
            destination, source = destination[active], source[active]
            size = size if size is None or size.ndim == 0 else size[active]
        width, lanes = access.width, np.arange(self.lanes) if active is None else active
        data = self._copied_bytes(access, source, size, lanes, active is None)
        self.count_shared(access.instruction, destination, active, width)
        flat = self.shared_offsets(access.instruction, destination, width, active)
        per_lane, cells = max(1, width // self.shared_cell), self.shared_cells(flat, width)
        self.check_pending(access.instruction, cells, active, per_lane, "cp.async write")
        self.check_async_write(access.instruction, cells, active, per_lane, data, "cp.async")
        self.pending[cells] = access.index + 1
        cells = cells.reshape(len(lanes), per_lane)
        self.cp_async_copies.append(_Copy(access, lanes, flat, data, cells, self.cp_async_group[lanes]))

    def _copied_bytes(self, access: Access, source, size, lanes, every_lane: bool):
        width = access.width
        if size is None or bool((size >= width).all()):
            return self._read_sources(access, source, None if every_lane else lanes)
        size = np.broadcast_to(size, len(lanes))
        data = np.zeros((len(lanes), width), u1)
        whole = np.flatnonzero(size >= width)
        if len(whole):
            data[whole] = self._read_sources(access, source[whole], lanes[whole])
        for lane in np.flatnonzero((size > 0) & (size < width)):
            for byte in range(int(size[lane])):
                address = source[lane : lane + 1] + u8(byte)
                flat = self.global_offsets(access.instruction, address, 1, lanes[lane : lane + 1])
                data[lane, byte] = self.memory[flat[0]]
        return data

    def _read_sources(self, access: Access, source, active):
        width = access.width
        flat = self.global_offsets(access.instruction, source, width, active)
        self.count_sectors(access, source, active)
        self.check_read("global", access.instruction, flat, width, active)
        return self.global_rows(u1, width)[flat // width]

    def commit_async_copies(self, mask) -> None:
        self.cp_async_group += 1 if mask is None else mask

    def wait_async_copies(self, groups: int | None, mask) -> None:
        """Let all but the last `groups` committed groups arrive; None: whatever was issued, committed or not."""
        left = []
        for copy in self.cp_async_copies:
            if groups is None:
                done = np.ones(len(copy.lanes), bool)
            else:
                done = copy.group < self.cp_async_group[copy.lanes] - groups
            if mask is not None:
                done &= mask[copy.lanes]
            if done.any():
                self._arrive(copy if done.all() else copy.part(done))
            if not done.all():
                left.append(copy.part(~done))
        self.cp_async_copies = left

    def _arrive(self, copy: _Copy) -> None:
        """After it waited, a warp may use what it copied; others after the next barrier."""
        width = copy.access.width
        self.shared_rows(u1, width)[copy.flat // width] = copy.data
        self.pending[copy.cells] = 0
        self.shared_shadow.acting_write(copy.cells, self.shared_actors[copy.lanes])
        self.shared_shadow.writer_instruction[copy.cells] = copy.access.index
        self.unfenced[copy.cells] = True
