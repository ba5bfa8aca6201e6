"""wgmma: products of a warpgroup (128 threads) with operands in shared memory, which run until they are waited for."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy import float32 as f4
from numpy import int64 as i8
from numpy import uint32 as u4

from .access import WarpgroupProduct
from .matrix_units import left_fragment
from .types import decode_operand

WARPGROUP = 128
_ELEMENT_BYTES = {"tf32": 4, "f16": 2, "bf16": 2}
_ATOM_ROW = {0: 16, 1: 128, 2: 64, 3: 32}  # bytes per row of a swizzle atom, by the descriptor's swizzle mode


class _Running(NamedTuple):
    """A product under way: first lane, cells of the operands and group number of each warpgroup."""

    product: WarpgroupProduct
    lanes: np.ndarray
    cells: np.ndarray
    group: np.ndarray

    def part(self, chosen) -> _Running:
        return _Running(self.product, *(field[chosen] for field in self[1:]))


class WarpgroupProducts:
    def start_products(self) -> None:
        self.products: list[_Running] = []
        self.product_group = np.zeros(self.lanes, i8)

    def multiply_warpgroup(self, product: WarpgroupProduct, registers, a, b, accumulate, mask) -> None:
        """D = A @ B, or C + A @ B: computed at issue; operands count as being read, D as unwritten, until the wait.

        a: a list of registers or, as b, a shared memory descriptor; accumulate: a bool, or one per lane.
        """
        self.require_whole(product.instruction, mask, WARPGROUP, "warpgroup")
        acting = np.ones(self.lanes // WARPGROUP, bool) if mask is None else mask.reshape(-1, WARPGROUP).any(1)
        groups = np.flatnonzero(acting)
        if isinstance(a, list):
            left = left_fragment(np.stack(a), self.lanes // 32, product.element)
            left, left_cells = left.reshape(-1, 64, product.depth)[acting], np.zeros((len(groups), 0), i8)
        else:
            left, left_cells = self._operand_tile(product, a, 64, product.a_rows_along_k, groups)
        right, right_cells = self._operand_tile(product, b, product.columns, product.b_rows_along_k, groups)
        result = np.matmul(left, right.transpose(0, 2, 1)) * f4(product.sign)
        count = product.columns // 2  # registers a lane
        full = np.zeros((count, len(acting), WARPGROUP), f4)
        result = result.reshape(len(groups), 4, 2, 8, product.columns // 8, 4, 2).transpose(4, 2, 6, 0, 1, 3, 5)
        full[:, acting] = result.reshape(count, len(groups), WARPGROUP)
        for register, value in zip(product.registers, full.reshape(count, self.lanes), strict=True):
            if accumulate is not False:
                total = value + registers[register].view(f4)
                value = total if accumulate is True else np.where(accumulate, total, value)
            self.write_result(registers, register, value.view(u4), mask)
        first_lanes, cells = groups * WARPGROUP, np.concatenate([left_cells, right_cells], axis=1)
        np.add.at(self.busy, cells, 1)  # warpgroups share cells
        self.products.append(_Running(product, first_lanes, cells, self.product_group[first_lanes]))

    def _operand_tile(self, product: WarpgroupProduct, descriptor, rows: int, rows_along_k: bool, groups):
        """A tile [warpgroups, rows, K] of shared memory, made of swizzled chunks of 16 bytes, and its cells."""
        descriptor = descriptor[::WARPGROUP][groups].astype(i8)
        start, leading, stride = ((descriptor >> shift & 0x3FFF) << 4 for shift in (0, 16, 32))
        swizzle = int(descriptor[0] >> 62 & 3)
        chunk, pitch = 16 // _ELEMENT_BYTES[product.element], _ATOM_ROW[swizzle]
        outer, inner = (product.depth, rows) if rows_along_k else (rows, product.depth)
        row, column = np.arange(outer)[:, None], np.arange(inner // chunk)
        chunks_per_row = pitch // 16
        start, leading, stride = (x[:, None, None] for x in (start, leading, stride))
        address = start + (row // 8) * stride + (row % 8) * pitch
        address = address + (column // chunks_per_row) * leading + (column % chunks_per_row) * 16
        if swizzle:
            address = address ^ ((address >> 7 & (chunks_per_row - 1)) << 4)
        lanes, highest = groups * WARPGROUP, int(address.max())
        if highest + 16 > self.shared_bytes:
            what = f"wgmma operand outside the {self.shared_bytes} bytes of shared memory"
            self.fault(product.instruction, "out-of-bounds", lanes, 0, highest, what)
            address = np.minimum(address, self.shared_stride - 16)
        flat = address + self.shared_base[lanes][:, None, None]
        cells = self.shared_cells(flat.ravel(), 16)
        self._check_operand(product, cells, np.repeat(lanes, len(cells) // len(groups)))
        bits = self.shared_rows(u4, 4)[flat // 16]  # [warpgroups, outer, chunks, 4 words]
        tile = decode_operand(bits, product.element).reshape(len(groups), outer, -1)
        return (tile.transpose(0, 2, 1) if rows_along_k else tile), cells.reshape(len(groups), -1)

    def _check_operand(self, product: WarpgroupProduct, cells, lanes) -> None:
        instruction = product.instruction
        fresh = self.shared_shadow.writer[cells] == 0
        if fresh.any():
            what = "wgmma reads uninitialised shared memory"
            self.uninitialised(instruction, ("shared",), what, int(fresh.sum()))
        self.check_proxy(instruction, cells, lanes, 1)
        self.check_pending(instruction, cells, lanes, 1, "wgmma read")
        self.check_copies(instruction, cells, lanes, 1, "wgmma read", warps=4)
        bad = self.shared_shadow.begin_async_read(cells, self.shared_actors[lanes], instruction.index, warps=4)
        if bad is not None:
            other = int(self.shared_shadow.writer_instruction[cells[np.argmax(bad)]])
            self.race(instruction, "shared", "wgmma read-after-write", bad, lanes, 1, cells, other)

    def commit_products(self, mask) -> None:
        self.product_group += 1 if mask is None else mask

    def wait_products(self, groups: int, mask) -> None:
        """Until all but the last `groups` committed groups are finished."""
        left = []
        for running in self.products:
            done = running.group < self.product_group[running.lanes] - groups
            if mask is not None:
                done &= mask[running.lanes]
            if done.any():
                finished = running.part(done)
                np.subtract.at(self.busy, finished.cells.ravel(), 1)
                self.shared_shadow.end_async_read(finished.cells, self.shared_actors[finished.lanes], warps=4)
            if not done.all():
                left.append(running.part(~done))
        self.products = left

    def report_unfenced(self, instruction, register: int, mask) -> None:
        """A register of a wgmma was read or written, on some path, without a wgmma.fence behind it."""
        lanes = np.arange(self.lanes) if mask is None else np.flatnonzero(mask)
        if len(lanes):
            name = self.kernel.register_names[register]
            message = f"register race: {name} accessed and no wgmma.fence before\n    {self.kernel.where(instruction)}"
            key = ("register", "wgmma.fence", instruction.line, 0)
            self.report.note(self.report.races, key, instruction, message, len(lanes))

    def check_results(self, instruction, registers: frozenset[int], mask) -> None:
        """Nothing but a wgmma may touch the registers of unfinished products: not read D, not write D or A."""
        for running in self.products:
            touched = registers & running.product.guarded
            if not touched:
                continue
            bad = np.zeros((self.lanes // WARPGROUP, WARPGROUP), bool)
            bad[running.lanes // WARPGROUP] = True
            bad = bad.ravel() if mask is None else bad.ravel() & mask
            if bad.any():
                cta, thread = self.lane(None, int(np.argmax(bad)))
                name, other = self.kernel.register_names[min(touched)], running.product.instruction
                message = (
                    f"register race: {name} of a wgmma used before wgmma.wait_group: CTA {cta} thread {thread}\n"
                    f"    {self.kernel.where(instruction)}\n    against {self.kernel.where(other)}"
                )
                key = ("register", "wgmma", instruction.line, other.line)
                self.report.note(self.report.races, key, instruction, message, int(bad.sum()))
