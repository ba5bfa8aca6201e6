"""Instructions of a whole warp: ldmatrix, stmatrix, shuffles, votes, reductions."""

from __future__ import annotations

import numpy as np
from numpy import int64 as i8
from numpy import uint16 as u2
from numpy import uint32 as u4
from numpy import uint64 as u8

from .access import MatrixAccess, WarpOperation
from .errors import PTXFault

_REDUCTIONS = {
    "add": np.add, "or": np.bitwise_or, "xor": np.bitwise_xor, "and": np.bitwise_and, "min": np.minimum,
    "max": np.maximum,
}  # fmt: skip


class Collectives:
    def require_whole(self, instruction, mask, lanes: int = 32, group: str = "warp") -> None:
        """A fault where a warp (or warpgroup) acts in part."""
        if mask is None:
            return
        groups = mask.reshape(-1, lanes)
        if (groups.any(1) != groups.all(1)).any():
            message = f"{instruction.base} with a partly active {group}\n  {self.kernel.where(instruction)}"
            fields = {"line": instruction.line, "text": instruction.text, "loc": instruction.loc}
            raise PTXFault("divergent collective", message, **fields)

    def load_matrix(self, access: MatrixAccess, registers, address, mask) -> None:
        """Lane 4g + t gets elements 2t and 2t + 1 of row g of each 8 x 8 matrix; of column g where transposed."""
        flat, active = self._matrix_rows(access, address, mask)
        self.check_read("shared", access.instruction, flat, 16, active)
        rows = self.shared_rows(u4, 4)[flat // 16].reshape(-1, access.count, 8, 4)
        if access.transposed:
            rows = _transposed(rows)
        values = np.ascontiguousarray(rows.transpose(1, 0, 2, 3)).reshape(access.count, -1)
        readers = None if values.shape[1] == self.lanes else np.flatnonzero(mask)
        for position, value in enumerate(values):
            self.put(access, registers, position, value, readers)

    def store_matrix(self, access: MatrixAccess, address, values, mask) -> None:
        """The inverse of `load_matrix`."""
        flat, active = self._matrix_rows(access, address, mask)
        data = np.stack(values, 1).reshape(-1, 32, access.count)
        if mask is not None:
            data = data[mask.reshape(-1, 32).all(1)]
        rows = np.ascontiguousarray(data.transpose(0, 2, 1)).reshape(-1, access.count, 8, 4)
        rows = (_transposed(rows) if access.transposed else rows).reshape(-1, 4)
        memory, at = self.shared_rows(u4, 4), flat // 16
        old = memory[at]
        memory[at] = rows
        self.check_write("shared", access.instruction, flat, 16, active, old, rows, memory[at])

    def _matrix_rows(self, access: MatrixAccess, address, mask):
        """Offsets of the rows, and the lanes that name them: lanes 8i .. 8i + 7 those of matrix i."""
        self.require_whole(access.instruction, mask)
        naming = np.tile(np.arange(32) < 8 * access.count, self.lanes // 32)
        active = self.select(naming if mask is None else naming & mask)
        address = address if active is None else address[active]
        self.count_shared(access.instruction, address, active, 16)
        return self.shared_offsets(access.instruction, address, 16, active), active

    def shuffle(self, operation: WarpOperation, value, step, clamp, mask):
        """shfl: the value of another lane, and whether that lane lies in range (else this lane's value)."""
        warps, lane, mode = self.lanes // 32, np.arange(32), operation.mode
        uniform = np.ndim(step) == 0 and np.ndim(clamp) == 0
        step, clamp = np.asarray(step).astype(i8), np.asarray(clamp).astype(i8)
        if not uniform:
            step, clamp = (np.broadcast_to(x, self.lanes).reshape(warps, 32) for x in (step, clamp))
        step, segment = step & 31, (clamp >> 8) & 31
        first = lane & segment
        last = first | (clamp & ~segment & 31)
        source = {"up": lane - step, "down": lane + step, "bfly": lane ^ step, "idx": first | (step & ~segment)}[mode]
        in_range = source >= last if mode == "up" else source <= last
        source = np.where(in_range, source, lane)

        def take(x):
            return np.take(x, source, axis=1) if uniform else np.take_along_axis(x, source, 1)

        if mask is not None and (mask.reshape(warps, 32) & ~take(mask.reshape(warps, 32))).any():
            self.uninitialised(operation.instruction, ("shfl",), "shfl reads a lane that is not active", 1)
        in_range = np.tile(in_range, warps) if uniform else in_range.reshape(-1)
        return take(value.reshape(warps, 32)).reshape(-1), in_range

    def vote(self, operation: WarpOperation, predicate, mask):
        """ballot: a bit for each lane; any, all, uni: a predicate; over the active lanes."""
        acting = np.ones(self.lanes, bool) if mask is None else mask
        yes, acting = (predicate & acting).reshape(-1, 32), acting.reshape(-1, 32)
        if operation.mode == "ballot":
            bits = (yes.astype(u8) << np.arange(32, dtype=u8)).sum(1).astype(u4)
            return np.repeat(bits, 32)
        every, some = (yes | ~acting).all(1), yes.any(1)
        return np.repeat({"any": some, "all": every, "uni": every | ~some}[operation.mode], 32)

    def reduce(self, operation: WarpOperation, value, mask):
        """redux: one reduction over the active lanes of each warp."""
        mode = operation.mode
        if mask is not None:
            limits = np.iinfo(value.dtype)
            neutral = {"and": -1, "min": limits.max, "max": limits.min}.get(mode, 0)
            value = np.where(mask, value, np.array(neutral).astype(value.dtype))
        return np.repeat(_REDUCTIONS[mode].reduce(value.reshape(-1, 32), axis=1, dtype=value.dtype), 32)


def _transposed(rows):
    """8 x 8 matrices of 16-bit elements, [..., 8, 4 words]."""
    return np.ascontiguousarray(rows.view(u2).transpose(0, 1, 3, 2)).view(u4)
