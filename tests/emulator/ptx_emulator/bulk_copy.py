"""Bulk tensor copies (TMA): loads that report to an mbarrier, stores and reductions that are waited for by group."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy import int32 as i4
from numpy import int64 as i8
from numpy import uint8 as u1
from numpy import uint32 as u4
from numpy import uint64 as u8

from .access import TensorCopy
from .atomics import OPERATIONS
from .checks import BULK
from .instruction import Instruction
from .tensor_map import Boxes
from .types import RAW

_NAN_OF_SIZE = {2: 0x7FFF, 4: 0x7FFFFFFF}


@dataclass
class _Load:
    """Copies of `size` bytes under way, one per issuing lane: barrier, shared offsets and data of chunks, whether it
    has arrived, number in `copy_seen`, cells."""

    instruction: Instruction
    size: int
    lanes: np.ndarray
    barrier: np.ndarray
    flat: np.ndarray
    data: np.ndarray
    done: np.ndarray
    ids: np.ndarray
    cells: np.ndarray

    def keep(self, chosen) -> None:
        for name in ("lanes", "barrier", "flat", "data", "done", "ids", "cells"):
            setattr(self, name, getattr(self, name)[chosen])


class _Store(NamedTuple):
    """Stores that still read shared memory: lanes, cells and group number of each."""

    instruction: Instruction
    lanes: np.ndarray
    cells: np.ndarray
    group: np.ndarray

    def part(self, chosen) -> _Store:
        return _Store(self.instruction, *(field[chosen] for field in self[1:]))


class BulkCopies:
    """copy_seen[copy, warp]: whether this warp waited for the copy, itself or through a barrier; copy 0 is none."""

    def start_bulk_copies(self) -> None:
        self.bulk_copies: list[_Load] = []
        self.bulk_stores: list[_Store] = []
        self.bulk_group = np.zeros(self.lanes, i8)
        self.copy_seen = np.zeros((1, self.threads // 32), bool)
        self.copy_instruction = np.zeros(1, i4)
        self.free_copies: list[int] = []

    # ---- loads
    def bulk_load(self, copy: TensorCopy, destination, descriptor, coordinates, barrier, mask) -> None:
        instruction = copy.instruction
        lanes, entries = self.barriers_at(instruction, barrier, mask)
        self.fruitless_waits = 0
        self.events += 1
        if lanes is None:
            return
        issued = np.zeros(len(lanes), bool)
        for boxes in self.decode_boxes(instruction, descriptor, coordinates, lanes, destination):
            self._issue_load(instruction, boxes, lanes[boxes.at], entries[boxes.at])
            issued[boxes.at] = True
        if not issued.all():  # faults are collected: nobody shall wait for the copies left out
            barriers = np.unique(entries[~issued])
            self.bytes_missing[barriers] = 0
            self.complete_phases(barriers)

    def _issue_load(self, instruction: Instruction, boxes: Boxes, lanes, barrier) -> None:
        count, chunks = boxes.shared.shape
        rows = self._load_boxes(instruction, boxes, lanes).reshape(-1, 16)
        writers = np.repeat(lanes, chunks)
        flat = self.shared_offsets(instruction, boxes.shared.ravel(), 16, writers)
        per_lane, cells = 16 // self.shared_cell, self.shared_cells(flat, 16)
        self.check_proxy(instruction, cells, writers, per_lane)
        self.unfenced[cells] = False
        self.check_pending(instruction, cells, writers, per_lane, "bulk copy write")
        self.check_async_write(instruction, cells, writers, per_lane, rows, "bulk copy")
        ids = self._new_copies(instruction, count)
        self.copy_of[cells] = np.repeat(ids, chunks * per_lane)
        data, cells = rows.reshape(count, chunks, 16).view(u4), cells.reshape(count, -1)
        flat, done = flat.reshape(count, chunks), np.zeros(count, bool)
        self.bulk_copies.append(_Load(instruction, chunks * 16, lanes, barrier, flat, data, done, ids, cells))

    def _load_boxes(self, instruction: Instruction, boxes: Boxes, lanes):
        """The bytes of the boxes, filled outside the tensor; one row per piece."""
        data = np.zeros((boxes.inside.size, boxes.piece), u1)
        if boxes.nan_fill:
            data.view(f"u{boxes.element.size}")[:] = _NAN_OF_SIZE.get(boxes.element.size, 0)
        if boxes.inside.any():
            readers = np.repeat(lanes, boxes.inside[0].size)[boxes.inside.ravel()]
            address = boxes.address[boxes.inside]
            flat = self.global_offsets(instruction, address, boxes.piece, readers)
            self.check_read("global", instruction, flat, boxes.piece, readers)
            self._count(instruction, address, len(lanes), boxes.piece)
            data[boxes.inside.ravel()] = self.global_rows(u1, boxes.piece)[flat // boxes.piece]
        return data

    def arrive_copies(self, barriers) -> None:
        """Let the copies that report to these mbarriers arrive."""
        for copy in self.bulk_copies:
            chosen = ~copy.done & np.isin(copy.barrier, barriers)
            if not chosen.any():
                continue
            self.shared_rows(u4, 4)[copy.flat[chosen] // 16] = copy.data[chosen]
            copy.done |= chosen
            np.subtract.at(self.bytes_missing, copy.barrier[chosen], copy.size)
            cells = copy.cells[chosen]
            self.shared_shadow.settled_write(cells, self.shared_actors[copy.lanes[chosen]])
            self.shared_shadow.writer_instruction[cells] = copy.instruction.index
        self.complete_phases(barriers)

    def release_copies(self, ctas) -> None:
        """At a barrier of CTAs (a mask, None for all): what one warp has waited for, all may use."""
        if not self.bulk_copies:
            return
        left = []
        for copy in self.bulk_copies:
            released = copy.done & self.copy_seen[copy.ids].any(1)
            if ctas is not None:
                released &= ctas[copy.lanes // self.threads]
            if released.any():
                cells, ids = copy.cells[released], copy.ids[released]
                owner = self.copy_of[cells]
                self.copy_of[cells] = np.where(owner == ids[:, None], 0, owner)
                self.free_copies += ids.tolist()
                copy.keep(~released)
            if len(copy.ids):
                left.append(copy)
        self.bulk_copies = left

    def _new_copies(self, instruction: Instruction, count: int):
        """Numbers for so many copies, which no warp has seen."""
        if len(self.free_copies) < count:
            known, more = len(self.copy_seen), max(64, count)
            self.copy_seen = np.concatenate([self.copy_seen, np.zeros((more, self.threads // 32), bool)])
            self.copy_instruction = np.concatenate([self.copy_instruction, np.zeros(more, i4)])
            self.free_copies += range(known, known + more)
        ids = np.array(self.free_copies[:count])
        del self.free_copies[:count]
        self.copy_seen[ids] = False
        self.copy_instruction[ids] = instruction.index
        return ids

    # ---- stores
    def bulk_store(self, copy: TensorCopy, descriptor, coordinates, source, mask) -> None:
        active = self.select(mask)
        lanes = np.arange(self.lanes) if active is None else active
        if not len(lanes):
            return
        for boxes in self.decode_boxes(copy.instruction, descriptor, coordinates, lanes, source):
            self._store_boxes(copy, boxes, lanes[boxes.at])

    def _store_boxes(self, copy: TensorCopy, boxes: Boxes, lanes) -> None:
        instruction = copy.instruction
        readers = np.repeat(lanes, boxes.shared.shape[1])
        flat = self.shared_offsets(instruction, boxes.shared.ravel(), 16, readers)
        self.check_read("shared", instruction, flat, 16, readers)
        cells = self.shared_cells(flat, 16)
        self.check_proxy(instruction, cells, readers, 16 // self.shared_cell)
        cells = cells.reshape(len(lanes), -1)
        np.add.at(self.busy, cells, BULK)
        self.bulk_stores.append(_Store(instruction, lanes, cells, self.bulk_group[lanes]))
        if not boxes.inside.any():
            return
        width = boxes.element.size if copy.operation else boxes.piece
        data = self.shared_rows(u1, 16)[flat // 16].reshape(-1, boxes.piece)[boxes.inside.ravel()].reshape(-1, width)
        parts = np.arange(0, boxes.piece, width, dtype=u8)
        address = (boxes.address[boxes.inside][:, None] + parts).ravel()
        writers = np.repeat(np.repeat(lanes, boxes.inside[0].size)[boxes.inside.ravel()], len(parts))
        self._write_boxes(copy, boxes, address, data, writers)
        self._count(instruction, address, len(lanes), width)

    def _write_boxes(self, copy: TensorCopy, boxes: Boxes, address, data, writers) -> None:
        width, instruction = data.shape[1], copy.instruction
        flat = self.global_offsets(instruction, address, width, writers)
        memory, at = self.global_rows(u1, width), flat // width
        if copy.operation is None:
            old = memory[at]
            memory[at] = data
            self.check_write("global", instruction, flat, width, writers, old, data, memory[at])
            return
        values, elements = data.view(f"u{width}")[:, 0], self.global_rows(RAW[width], 1)[:, 0]
        for lane in np.unique(writers):  # one CTA after the other
            here = writers == lane
            elements[at[here]] = OPERATIONS[copy.operation](elements[at[here]], values[here], None, boxes.element.type)
        self.check_write("global", instruction, flat, width, writers, atomic=True)

    def commit_bulk_stores(self, mask) -> None:
        self.bulk_group += 1 if mask is None else mask

    def wait_bulk_stores(self, groups: int, mask) -> None:
        """Until all but the last `groups` committed groups have read their sources."""
        left = []
        for store in self.bulk_stores:
            done = store.group < self.bulk_group[store.lanes] - groups
            if mask is not None:
                done &= mask[store.lanes]
            if done.any():
                finished = store.part(done)
                np.subtract.at(self.busy, finished.cells.ravel(), BULK)
                self.shared_shadow.end_async_read(finished.cells, self.shared_actors[finished.lanes], warps=1)
            if not done.all():
                left.append(store.part(~done))
        self.bulk_stores = left

    def check_nothing_in_flight(self) -> None:
        """At the end of a CTA."""
        for copy in self.bulk_copies:
            if not copy.done.all():
                conflict = "kernel ends with a bulk copy in flight"
                self.race(copy.instruction, "shared", conflict, ~copy.done, copy.lanes, 1, copy.cells[:, 0])
        for store in self.bulk_stores:
            conflict = "kernel ends before cp.async.bulk.wait_group of a bulk store"
            every = np.ones(len(store.lanes), bool)
            self.race(store.instruction, "shared", conflict, every, store.lanes, 1, store.cells[:, 0])

    def _count(self, instruction: Instruction, address, requests: int, width: int) -> None:
        counters = self.report.requests[instruction.index]
        counters[0] += requests
        counters[1] += len(np.unique(address >> u8(5)))
        counters[2] += len(address) * width
