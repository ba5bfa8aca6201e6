"""The machine: the state of a launch and of the batch of CTAs that runs, with what every unit of it does."""

from __future__ import annotations

import numpy as np
from numpy import int64 as i8
from numpy import uint8 as u1
from numpy import uint16 as u2
from numpy import uint32 as u4
from numpy import uint64 as u8

from .async_copy import AsyncCopies
from .atomics import Atomics
from .buffers import Buffer, poisoned
from .bulk_copy import BulkCopies
from .checks import Checks
from .collectives import Collectives
from .errors import PTXError
from .flow import Flow
from .global_memory import GlobalMemory
from .load_store import LoadStore
from .matrix_units import MatrixUnits
from .mbarrier import MemoryBarriers
from .report import Report
from .shadow import CTA_BITS
from .shared_memory import SharedMemory
from .tensor_map import TensorMaps
from .vector_clocks import Clocks
from .warpgroup_products import WarpgroupProducts

# Contents of a register before it is written, by its size: NaN in every float format.
_UNWRITTEN = {0: np.bool_(False), 1: u1(0), 2: u2(0x7FFF), 4: u4(0x7FBADBAD), 8: u8(0x7FF8BADBADBADBAD)}


class Machine(
    GlobalMemory,
    SharedMemory,
    LoadStore,
    Atomics,
    AsyncCopies,
    Collectives,
    MatrixUnits,
    WarpgroupProducts,
    MemoryBarriers,
    TensorMaps,
    BulkCopies,
    Checks,
    Clocks,
):
    """One launch. Several CTAs run at once, a batch; lane = thread + threads * position of the CTA in the batch.

    All threads run in lock step: a register is an array with one element per lane. A `mask` says which lanes act, None
    that all do; `active` holds the indices of those that act, None that all do.

    threads, lanes, ctas, cta_count   per CTA; of the batch; coordinates of its CTAs, and how many
    epochs, actors                    barriers that a CTA has passed; each lane's key for the race checks (`shadow`)
    shared_actors                     the same for shared memory; where warps are specialised, the lane's warp
    collect                           whether faults are noted in the report rather than raised
    """

    def __init__(self, flow: Flow, grid: tuple[int, int, int], threads: int, shared_bytes: int, collect: bool) -> None:
        self.kernel, self.grid, self.threads, self.collect = flow.kernel, grid, threads, collect
        self.flow, self.doubtful, self.specialised = flow, flow.doubtful, flow.specialised
        self.report = Report(flow.kernel.name, flow)
        self.shared_bytes = max(shared_bytes, flow.kernel.static_shared)
        self.shared_stride = _round_up(max(self.shared_bytes, 16), 16)
        self.local_stride = _round_up(max(flow.kernel.local_size, 16), 16)
        self.shared_cell = self.smallest_shared_access()
        self.memo: dict = {}
        self.buffers: list[Buffer] = []
        self.descriptor_element_sizes: list[int] = []
        self.parameter_bytes: dict[str, bytes] = {}
        self.fenced_maps: set[int] = set()
        self.acquired_maps: set[tuple[int, int]] = set()

    def start_batch(self, ctas: list[tuple[int, int, int]]) -> None:
        """Fresh registers, shared and local memory for these CTAs."""
        self.ctas, self.cta_count = ctas, len(ctas)
        self.lanes = self.cta_count * self.threads
        self.start_clocks()
        self.build_shared()
        local_size = self.kernel.local_size
        self.local = poisoned(self.lanes * self.local_stride) if local_size else None
        self.defined: dict[int, np.ndarray] = {}
        self.carry = np.zeros(self.lanes, u4)
        self.start_async_copies()
        self.start_products()
        self.start_memory_barriers()
        self.start_bulk_copies()
        self.special = self._special_registers()
        linear = [x + self.grid[0] * (y + self.grid[1] * z) for x, y, z in ctas]
        cta_key = (np.array(linear, i8) + 1) << CTA_BITS
        self.first_key = np.repeat(cta_key, self.threads) + self.special["%warpid"].astype(i8)
        self.epochs = np.ones(self.cta_count, i8)
        self.update_keys()
        unwritten = {size: np.full(self.lanes, value) for size, value in _UNWRITTEN.items()}
        self.registers = [unwritten[size] for size in self.kernel.register_sizes]

    def pass_barrier(self, ctas=None) -> None:
        """All threads of these CTAs (a mask, None for all) met at a barrier."""
        self.epochs[slice(None) if ctas is None else ctas] += 1
        self.update_keys()
        self.release_copies(ctas)

    def update_keys(self) -> None:
        self.actors = self.first_key + np.repeat(self.epochs << i8(8), self.threads)
        self.shared_actors = np.arange(self.lanes) // 32 if self.specialised else self.actors

    def select(self, mask):
        """The indices of the active lanes; None for all."""
        if mask is None:
            return None
        active = np.flatnonzero(mask)
        return None if len(active) == self.lanes else active

    def _special_registers(self) -> dict[str, np.ndarray]:
        thread = np.tile(np.arange(self.threads), self.cta_count).astype(u4)
        zero = np.zeros(self.lanes, u4)
        special = {
            "%tid.x": thread,
            "%tid.y": zero,
            "%tid.z": zero,
            "%ntid.x": zero + u4(self.threads),
            "%ntid.y": zero + u4(1),
            "%ntid.z": zero + u4(1),
            "%laneid": thread & u4(31),
            "%warpid": thread >> u4(5),
            "%nwarpid": zero + u4(self.threads // 32),
            "%smid": np.repeat(np.arange(self.cta_count, dtype=u4), self.threads),
            "%nsmid": zero + u4(self.cta_count),
            "%clock": zero,
            "%globaltimer_lo": zero,
            **dict.fromkeys(("%clock64", "%globaltimer", "%gridid"), zero.astype(u8)),
        }
        for axis, name in enumerate("xyz"):
            special[f"%ctaid.{name}"] = np.repeat(np.array([cta[axis] for cta in self.ctas], u4), self.threads)
            special[f"%nctaid.{name}"] = zero + u4(self.grid[axis])
        bit = u8(1) << (thread & u4(31)).astype(u8)
        equal, below = bit.astype(u4), (bit - u8(1)).astype(u4)
        masks = {"eq": equal, "lt": below, "le": below | equal, "gt": ~(below | equal), "ge": ~below}
        return special | {f"%lanemask_{name}": mask for name, mask in masks.items()}

    def require_whole_cta(self, instruction, count: int) -> None:
        """A barrier with a thread count."""
        if count != self.threads:
            where = self.kernel.where(instruction)
            raise PTXError(f"a barrier for {count} of {self.threads} threads is not supported\n  {where}")


def _round_up(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple
