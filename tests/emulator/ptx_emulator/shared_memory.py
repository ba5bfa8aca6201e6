"""Shared memory: one array over the CTAs of a batch; translation of addresses, bank conflicts."""

from __future__ import annotations

import numpy as np
from numpy import int32 as i4
from numpy import int64 as i8

from .buffers import poisoned
from .instruction import Instruction, access_width
from .shadow import Shadow
from .vector_clocks import VectorShadow

_CLASSES = ("ld.shared", "st.shared", "atom.shared", "cp.async", "ldmatrix", "stmatrix", "tensormap", "mbarrier")
_MEMO_LIMIT = 50_000


class SharedMemory:
    """`shared` holds `shared_stride` bytes for each CTA of the batch; `shared_base`: the first byte of a lane's CTA.

    The state of the checks, by cell: `shared_shadow`; `unfenced`, generic writes that no proxy fence has
    followed; `pending`, 1 + the cp.async that is under way to a cell; `busy`, readers of the asynchronous engine: wgmma
    operands count 1, sources of bulk stores BULK; `copy_of`, the number of the bulk copy that last wrote a cell.
    """

    def build_shared(self) -> None:
        size = self.cta_count * self.shared_stride
        self.shared = poisoned(size)
        self.shared_views = {}
        self.shared_base = np.repeat(np.arange(self.cta_count), self.threads) * self.shared_stride
        cells = size // self.shared_cell
        self.shared_shadow = VectorShadow(cells, self.clocks) if self.specialised else Shadow(cells, local=True)
        self.pending, self.last_lane, self.busy, self.copy_of = np.zeros((4, cells), i4)
        self.unfenced = np.zeros(cells, bool)

    def smallest_shared_access(self) -> int:
        instructions = self.kernel.instructions
        widths = [access_width(one) for one in instructions if one.counted_as in _CLASSES]
        least = 4 if self.specialised else 1  # a `VectorShadow` has as many clocks for a cell as there are warps
        return max(min([width for width in widths if width] + [16]), least)

    def shared_rows(self, dtype, vector: int):
        """Shared memory as rows of `vector` elements."""
        view = self.shared_views.get((dtype, vector))
        if view is None:
            view = self.shared_views[dtype, vector] = self.shared.view(dtype).reshape(-1, vector)
        return view

    def shared_offsets(self, instruction: Instruction, address, width: int, active):
        """Offsets in `shared` of the addresses of the active lanes; faults where one is misaligned or out of bounds."""
        offset = address.astype(i8)
        misaligned = (offset & (width - 1)) != 0
        if misaligned.any():
            at = int(np.flatnonzero(misaligned)[0])
            self.fault(instruction, "misaligned", active, at, int(offset[at]), f"{width}-byte shared access")
            offset = offset & ~i8(width - 1)
        if int(offset.max()) + width > self.shared_bytes:
            outside = offset + width > self.shared_bytes
            at = int(np.flatnonzero(outside)[0])
            what = f"{width}-byte shared access; the kernel has {self.shared_bytes} bytes"
            self.fault(instruction, "out-of-bounds", active, at, int(offset[at]), what)
            offset = np.where(outside, 0, offset)
        return offset + (self.shared_base if active is None else self.shared_base[active])

    def count_wavefronts(self, instruction: Instruction, address, mask, width: int) -> None:
        """Bank conflicts of the first active CTA, taken for all: 32 banks of 4 bytes; 8-byte accesses in 2 phases of 16
        lanes, 16-byte ones in 4 phases of 8."""
        cta = 0 if mask is None else int(np.argmax(mask)) // self.threads
        lanes = slice(cta * self.threads, (cta + 1) * self.threads)
        address, mask_of_cta = address[lanes], None if mask is None else mask[lanes]
        key = (instruction.index, address.tobytes(), None if mask_of_cta is None else mask_of_cta.tobytes())
        found = self.memo.get(key)
        if found is None:
            if len(self.memo) > _MEMO_LIMIT:
                self.memo.clear()
            found = self.memo[key] = self._wavefronts(address, mask_of_cta, max(1, width // 4))
        ctas = self.cta_count if mask is None else len(np.unique(np.flatnonzero(mask) // self.threads))
        counters = self.report.wavefronts[instruction.index]
        counters[0] += found[0] * ctas
        counters[1] += found[1] * ctas

    def _wavefronts(self, address, mask, words: int) -> tuple[int, int]:
        """Wavefronts of a CTA's access of `words` words a lane, and how many there were without conflicts."""
        touched = address.astype(i8)[:, None] // 4 + np.arange(words)
        if mask is not None:
            touched[~mask] = -1
        touched = np.sort(touched.reshape(-1, 32), axis=1)  # a row per phase
        distinct = touched >= 0
        distinct[:, 1:] &= touched[:, 1:] != touched[:, :-1]
        phases = len(touched)
        banks = (np.arange(phases)[:, None] * 32 + (touched & 31))[distinct]
        uses = np.bincount(banks, minlength=phases * 32).reshape(phases, 32).max(1)
        return int(uses.sum()), int(np.count_nonzero(uses))

    def shared_cells(self, flat, width: int):
        return cells_of(flat, width, self.shared_cell)


def cells_of(flat, width: int, cell: int):
    """Shadow cells of accesses of `width` bytes: width // cell for each access, in order."""
    first = flat // cell
    return first if width <= cell else (first[:, None] + np.arange(width // cell)).ravel()
