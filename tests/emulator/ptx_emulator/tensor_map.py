"""Tensor maps: the 128 bytes that describe a tensor to the copy engine, in this emulator's encoding."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy import int32 as i4
from numpy import int64 as i8
from numpy import uint8 as u1
from numpy import uint32 as u4
from numpy import uint64 as u8

from .instruction import Instruction

MAP_BYTES = 128


class _Field(NamedTuple):
    offset: int
    size: int


class _Element(NamedTuple):
    type: str
    size: int


FIELDS = {
    "global_address": _Field(0, 8), "rank": _Field(8, 4), "elemtype": _Field(12, 4), "swizzle_mode": _Field(16, 4),
    "interleave_layout": _Field(20, 4), "fill_mode": _Field(24, 4), "box_dim": _Field(28, 4),
    "global_dim": _Field(48, 4), "element_stride": _Field(68, 4), "global_stride": _Field(88, 8),
}  # fmt: skip
# By PTX's number of an element type.
ELEMENT_TYPES = {
    0: _Element("u8", 1), 1: _Element("u16", 2), 2: _Element("u32", 4), 3: _Element("s32", 4), 4: _Element("u64", 8),
    5: _Element("s64", 8), 6: _Element("f16", 2), 7: _Element("f32", 4), 8: _Element("f32", 4), 9: _Element("f64", 8),
    10: _Element("bf16", 2), 11: _Element("tf32", 4), 12: _Element("tf32", 4),
}  # fmt: skip
_FORMAT_WORDS = slice(2, 12)  # of a map's 32 words: everything but address, sizes and strides


class Boxes(NamedTuple):
    """The boxes that bulk copies move, for maps of one format.

    at          positions of the copies among the lanes that issue them
    element     type and bytes; nan_fill: elements outside the tensor become NaN, else 0
    address     global addresses [copies, rows, pieces] of pieces of `piece` bytes, inside: which lie in the tensor
    shared      shared addresses [copies, chunks] of the chunks of 16 bytes, swizzled
    """

    at: np.ndarray
    element: _Element
    nan_fill: bool
    address: np.ndarray
    inside: np.ndarray
    piece: int
    shared: np.ndarray


class _Maps(NamedTuple):
    """Maps of one format: rank, box (elements, innermost first), swizzle mode; by map: words, base, strides, sizes."""

    number: int
    interleave: int
    fill: int
    swizzle: int
    rank: int
    box: list[int]
    words: np.ndarray
    base: np.ndarray
    stride: np.ndarray
    size: np.ndarray

    @classmethod
    def of(cls, words) -> _Maps:
        """words: [maps, 32], of one format."""
        first = words[0]
        rank = int(first[2]) + 1
        base = np.ascontiguousarray(words[:, :2]).view(i8)[:, 0]
        stride = np.ascontiguousarray(words[:, 22:30]).view(i8)[:, : max(rank - 1, 0)]
        box = [int(extent) for extent in first[7 : 7 + rank]]
        number, swizzle, interleave, fill = (int(first[word]) for word in (3, 4, 5, 6))
        return cls(number, interleave, fill, swizzle, rank, box, words, base, stride, words[:, 12:17].astype(i8))

    def objections(self, coordinates: int, shared) -> list[tuple]:
        """(where it holds, what is wrong), for a copy with so many coordinates at these shared addresses."""
        element = ELEMENT_TYPES.get(self.number)
        known = element is not None and element.type != "tf32" and not self.interleave
        known = known and self.fill <= 1 and self.swizzle <= 3
        row = self.box[0] * element.size if element and self.box else 0
        atom = 16 << min(self.swizzle, 3)
        unsupported = (
            f"element type {self.number}, swizzle {self.swizzle}, interleave {self.interleave}, fill {self.fill}: "
            "unset or not supported"
        )
        return [
            (not known, unsupported),
            (self.rank != coordinates, f"rank {self.rank} used with {coordinates} coordinates"),
            (not all(1 <= extent <= 256 for extent in self.box), f"box dimensions {self.box} must be 1 to 256"),
            (row % 16 != 0 or (self.swizzle and row != atom), f"inner box of {row} bytes with {atom}-byte swizzle"),
            ((self.base & 15) != 0, "global address is not a multiple of 16 bytes"),
            (
                (self.stride & 15 | self.stride >> 40).any(1),
                f"global stride is not a multiple of 16 bytes below 2^40: {self.stride[0].tolist()}",
            ),
            ((self.words[:, 17 : 17 + self.rank] != 1).any(1), "element stride other than 1 is not supported"),
            ((shared & 127) != 0, "shared address is not a multiple of 128 bytes"),
        ]

    def boxes(self, at, coordinates, shared) -> Boxes:
        """coordinates [copies, rank], innermost first; shared addresses [copies]."""
        element = ELEMENT_TYPES[self.number]
        row_bytes = self.box[0] * element.size
        row, inside = self.base[:, None], np.ones((len(at), 1), bool)
        for axis in range(1, self.rank):
            position = coordinates[:, axis, None] + np.arange(self.box[axis])
            exists = (position >= 0) & (position < self.size[:, axis, None])
            offset = position * self.stride[:, axis - 1, None]
            row = (offset[:, :, None] + row[:, None]).reshape(len(at), -1)
            inside = (exists[:, :, None] & inside[:, None]).reshape(len(at), -1)
        start, end = coordinates[:, :1] * element.size, self.size[:, :1] * element.size
        piece = element.size if ((start | end) & 15).any() else 16
        start = start + np.arange(0, row_bytes, piece)
        inside = inside[:, :, None] & ((start >= 0) & (start + piece <= end))[:, None]
        chunk = shared[:, None] + np.arange(0, row_bytes * row.shape[1], 16)
        if self.swizzle:
            chunk = chunk ^ ((chunk >> 7 & ((1 << self.swizzle) - 1)) << 4)
        address = (row[:, :, None] + start[:, None]).view(u8)
        return Boxes(at, element, bool(self.fill), address, inside, piece, chunk)


class TensorMaps:
    """fenced_maps: offsets of maps that the kernel wrote; acquired_maps: (offset, CTA of the batch) that may use it."""

    def copy_map(self, instruction: Instruction, destination, source, mask) -> None:
        """tensormap.cp_fenceproxy: a map from shared to global memory, once per warp."""
        self.require_whole(instruction, mask)
        warps = np.arange(self.lanes // 32) if mask is None else np.flatnonzero(mask.reshape(-1, 32).any(1))
        if not len(warps):
            return
        lanes = np.repeat(warps * 32, MAP_BYTES // 16)
        offset = np.tile(np.arange(0, MAP_BYTES, 16, dtype=u8), len(warps))
        flat = self.shared_offsets(instruction, source[lanes] + offset, 16, lanes)
        global_flat = self.global_offsets(instruction, destination[lanes] + offset, 16, lanes)
        data, memory, at = self.shared_rows(u4, 4)[flat // 16], self.global_rows(u4, 4), global_flat // 16
        old = memory[at]
        memory[at] = data
        self.check_read("shared", instruction, flat, 16, lanes)
        self.check_write("global", instruction, global_flat, 16, lanes, old, data, memory[at])
        written = set(global_flat[:: MAP_BYTES // 16].tolist())
        self.fenced_maps |= written
        self.acquired_maps = {known for known in self.acquired_maps if known[0] not in written}

    def acquire_map(self, instruction: Instruction, address, mask) -> None:
        """fence.proxy.tensormap acquire: the active CTAs may use the map."""
        active = self.select(mask)
        lanes = np.arange(self.lanes) if active is None else active
        if len(lanes):
            flat = self.global_offsets(instruction, address[lanes], 16, lanes)
            self.acquired_maps |= set(zip(flat.tolist(), (lanes // self.threads).tolist(), strict=True))

    def decode_boxes(self, instruction: Instruction, address, coordinates, lanes, shared):
        """`Boxes` of the copies that these lanes issue, by format of map; faults, or leaves out, where a map is wrong.

        address: of the maps; coordinates: a list of registers, innermost first; shared: addresses; all by lane.
        """
        words = self._read_maps(instruction, address, lanes)
        position = np.stack([np.broadcast_to(one, self.lanes)[lanes] for one in coordinates], 1).view(i4).astype(i8)
        shared = shared[lanes].astype(i8)
        for format_words in np.unique(words[:, _FORMAT_WORDS], axis=0):
            at = np.flatnonzero((words[:, _FORMAT_WORDS] == format_words).all(1))
            maps = _Maps.of(words[at])
            wrong = [
                (np.broadcast_to(where, len(at)), what)
                for where, what in maps.objections(len(coordinates), shared[at])
                if np.any(where)
            ]
            if wrong:
                where, what = wrong[0]
                first = int(np.argmax(where))
                nearest = f"tensor map of {self.near(int(maps.base[first]))}"
                self.fault(instruction, "tensor map", lanes[at], first, int(address[lanes[at[first]]]), what, nearest)
                continue
            yield maps.boxes(at, position[at], shared[at])

    def _read_maps(self, instruction: Instruction, address, lanes):
        """The maps' words [lanes, 32]."""
        chunks = MAP_BYTES // 16
        offset = np.tile(np.arange(0, MAP_BYTES, 16, dtype=u8), len(lanes))
        readers = np.repeat(lanes, chunks)
        flat = self.global_offsets(instruction, address[readers] + offset, 16, readers)
        self.check_read("global", instruction, flat, 16, readers)
        keys = zip(flat[::chunks].tolist(), (lanes // self.threads).tolist(), strict=True)
        stale = np.array([key[0] in self.fenced_maps and key not in self.acquired_maps for key in keys])
        if stale.any():
            conflict = "tensor map used without fence.proxy.tensormap acquire"
            self.race(instruction, "global", conflict, stale, lanes, 1, flat[::chunks] // self.global_cell)
        return self.global_rows(u4, 4)[flat // 16].reshape(-1, MAP_BYTES // 4)


def host_map(address: int, descriptor, layout: dict) -> np.ndarray:
    """The bytes of the map of a host's TensorDescriptor at an address; layout: Triton's `tensordesc_meta` of it."""
    size, rank = layout["elem_size"], len(descriptor.shape)
    values = {
        "global_address": [address],
        "rank": [rank - 1],
        "elemtype": [layout["elem_type"]],
        "swizzle_mode": [layout["swizzle"]],
        "fill_mode": [int(getattr(descriptor, "padding", "zero") == "nan")],
        "box_dim": layout["block_size"][::-1],
        "global_dim": descriptor.shape[::-1],
        "element_stride": [1] * rank,
        "global_stride": [stride * size for stride in descriptor.strides[-2::-1]],
    }
    data = np.zeros(MAP_BYTES, u1)
    for name, numbers in values.items():
        field = FIELDS[name]
        if len(numbers):
            data[field.offset : field.offset + field.size * len(numbers)].view(f"u{field.size}")[:] = numbers
    return data
