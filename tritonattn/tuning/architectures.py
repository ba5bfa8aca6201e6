"""GPU architectures: their memories, and by family the tiles where no table has a config, compiled and read, not timed.

A new architecture of a known family is an entry of `ARCHITECTURES`. A new family is a `Family` too.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

# By kernel and the wider of the padded head and value dims: block_m, block_n, num_warps, num_stages.
Tiles = Mapping[str, Mapping[int, tuple[int, int, int, int]]]
# By kernel: values of block_m (of decode by its packed rows), block_n, num_warps, num_stages.
Ranges = Mapping[str, tuple[tuple[int, ...], ...]]

_NARROW_RANGES: Ranges = {
    "forward": ((64, 128), (32, 64, 128), (4, 8), (2, 3, 4)),
    "grad_query": ((64, 128), (32, 64, 128), (4, 8), (2, 3)),
    "grad_key_value": ((32, 64, 128), (32, 64, 128), (4, 8), (2, 3)),
    "decode": ((), (32, 64, 128), (2, 4), (2, 3, 4)),
    "tangent": ((64, 128), (32, 64), (4, 8), (2, 3)),
    "grad_query_second": ((32, 64, 128), (16, 32), (4, 8), (2, 3)),
    "grad_key_value_second": ((16, 32, 64), (16, 32, 64, 128), (4, 8), (2, 3)),
}
_WIDE_RANGES: Ranges = {
    "forward": ((64, 128), (32, 64, 128), (4, 8), (1, 2, 3, 4)),
    "grad_query": ((32, 64, 128), (32, 64), (4, 8), (1, 2, 3)),
    "grad_key_value": ((32, 64), (32, 64), (4, 8), (1, 2, 3)),
    "decode": ((), (32, 64, 128), (2, 4), (2, 3, 4)),
    "tangent": ((32, 64, 128), (16, 32), (4, 8), (1, 2)),
    "grad_query_second": ((16, 32), (16, 32, 64), (4, 8), (1, 2)),
    "grad_key_value_second": ((16, 32, 64), (16, 32), (4, 8), (1, 2)),
}
_AMD_RANGES: Ranges = {
    "forward": ((64, 128), (32, 64), (4, 8), (1, 2)),
    "grad_query": ((32, 64), (16, 32, 64), (4, 8), (1, 2)),
    "grad_key_value": ((16, 32), (32, 64), (4, 8), (1, 2)),
    "decode": ((), (16, 32, 64), (2, 4), (1, 2)),
    "tangent": ((64, 128), (16, 32), (4,), (1, 2)),
    "grad_query_second": ((32, 64), (16, 32), (4,), (1, 2)),
    "grad_key_value_second": ((16, 32), (32, 64), (4,), (1, 2)),
}


@dataclass(frozen=True)
class Family:
    """Architectures that take the same tiles.

    products     the instruction of a block's products; that of AMD's matrix cores is "mfma"
    tiles        of 16-bit operands
    decode       by width: block_n, num_warps, num_stages. Decoding waits for memory: two blocks of keys are on their
                 way to every program, and several programs run on a multiprocessor.
    described    `tiles` where tensor descriptors load them, which cost no registers for addresses
    float32      by width. IEEE fp32 products run on NVIDIA's FMA units, from registers, and on AMD's matrix cores,
                 where a thread of 4 warps has twice as many registers as one of 8.
    ranges       of the tuner's candidates: of head dims up to 128, and of wider ones
    many_rows_warps   warps of a decode program whose rows hold 8192 elements of q or more
    """

    products: Literal["mma.sync", "wgmma", "tcgen05", "mfma"]
    tiles: Tiles
    decode: Mapping[int, tuple[int, int, int]]
    described: Tiles = field(default_factory=dict)
    float32: Mapping[int, tuple[int, int, int, int]] = field(
        default_factory={64: (32, 32, 8, 1), 128: (32, 16, 8, 1), 256: (16, 16, 8, 2), 512: (16, 16, 8, 1)}.copy
    )
    ranges: tuple[Ranges, Ranges] = (_NARROW_RANGES, _WIDE_RANGES)
    many_rows_warps: int = 4


_SERVERS_DECODE = {64: (64, 4, 3), 128: (64, 4, 3), 256: (32, 4, 3), 512: (16, 4, 3), 1024: (16, 4, 2)}
_DESKTOPS_DECODE = {64: (64, 4, 3), 128: (32, 4, 3), 256: (32, 4, 2), 512: (16, 4, 2), 1024: (16, 4, 2)}

_SM_80 = Family(
    products="mma.sync",
    tiles={
        "forward": {64: (128, 64, 4, 2), 128: (128, 64, 8, 2), 256: (64, 64, 8, 2), 512: (32, 64, 8, 1)},
        "grad_query": {64: (128, 32, 4, 2), 128: (128, 64, 8, 2), 256: (64, 32, 8, 2), 512: (32, 32, 8, 1)},
        "grad_key_value": {64: (64, 128, 8, 2), 128: (128, 64, 8, 2), 256: (32, 64, 8, 2), 512: (32, 16, 8, 1)},
        "tangent": {64: (128, 32, 8, 2), 128: (128, 32, 8, 2), 256: (64, 16, 8, 2)},
        "grad_query_second": {64: (128, 32, 8, 2), 128: (32, 32, 4, 2), 256: (16, 16, 8, 2)},
        "grad_key_value_second": {64: (32, 32, 4, 2), 128: (32, 16, 4, 2), 256: (16, 16, 8, 2)},
    },
    decode=_SERVERS_DECODE,
)
_SM_86 = Family(
    products="mma.sync",
    tiles={
        "forward": {64: (128, 64, 4, 2), 128: (128, 32, 8, 2), 256: (64, 32, 8, 2), 512: (16, 32, 8, 1)},
        "grad_query": {64: (128, 32, 4, 2), 128: (128, 64, 8, 2), 256: (64, 32, 8, 1), 512: (16, 32, 8, 1)},
        "grad_key_value": {64: (64, 128, 8, 2), 128: (32, 64, 4, 2), 256: (32, 32, 8, 1), 512: (16, 16, 8, 1)},
        "tangent": {64: (128, 32, 8, 2), 128: (32, 32, 4, 2), 256: (32, 16, 8, 2)},
        "grad_query_second": {64: (32, 32, 4, 2), 128: (32, 32, 4, 2), 256: (16, 16, 8, 2)},
        "grad_key_value_second": {64: (32, 32, 4, 2), 128: (32, 16, 4, 2), 256: (16, 16, 8, 2)},
    },
    decode=_DESKTOPS_DECODE,
)
_SM_90 = Family(
    products="wgmma",
    tiles={
        "forward": {64: (128, 128, 8, 2), 128: (128, 64, 8, 2), 256: (64, 64, 8, 2), 512: (32, 32, 8, 1)},
        "grad_query": {64: (128, 64, 4, 2), 128: (128, 64, 8, 2), 256: (128, 32, 8, 2), 512: (32, 64, 8, 1)},
        "grad_key_value": {64: (64, 64, 4, 2), 128: (32, 64, 4, 2), 256: (32, 32, 8, 1), 512: (64, 16, 8, 1)},
        "tangent": {64: (128, 32, 8, 2), 128: (128, 32, 8, 2), 256: (32, 16, 8, 2)},
        "grad_query_second": {64: (128, 32, 8, 2), 128: (16, 64, 4, 2), 256: (16, 16, 8, 2)},
        "grad_key_value_second": {64: (32, 32, 4, 2), 128: (32, 16, 4, 2), 256: (16, 16, 8, 2)},
    },
    decode=_SERVERS_DECODE,
    described={
        "forward": {64: (128, 128, 4, 2), 128: (128, 128, 8, 2), 256: (128, 64, 8, 2), 512: (64, 32, 8, 2)},
        "grad_query": {64: (128, 64, 4, 2), 128: (128, 128, 8, 2), 256: (64, 32, 4, 2)},
        "grad_key_value": {128: (64, 64, 4, 2)},  # width 64 has fewer instructions with pointers
    },
)
_SM_100 = Family(
    products="tcgen05",
    tiles={
        "forward": {64: (128, 128, 8, 2), 128: (128, 128, 8, 2), 256: (128, 64, 8, 1), 512: (32, 32, 8, 1)},
        "grad_query": {64: (128, 64, 8, 2), 128: (128, 64, 8, 2), 256: (128, 32, 8, 2), 512: (32, 64, 8, 1)},
        "grad_key_value": {64: (64, 128, 8, 2), 128: (64, 128, 8, 2), 256: (32, 32, 8, 1), 512: (64, 16, 8, 1)},
        "tangent": {64: (128, 32, 8, 2), 128: (128, 32, 8, 2), 256: (64, 16, 8, 2)},
        "grad_query_second": {64: (128, 32, 8, 2), 128: (32, 32, 4, 2), 256: (16, 16, 8, 2)},
        "grad_key_value_second": {64: (32, 32, 4, 2), 128: (32, 16, 4, 2), 256: (16, 16, 8, 2)},
    },
    decode=_SERVERS_DECODE,
    described={
        "forward": {64: (128, 128, 8, 2), 128: (128, 128, 8, 2), 256: (128, 64, 8, 2), 512: (64, 32, 8, 2)},
        "grad_query": {64: (128, 128, 8, 2), 128: (128, 64, 8, 2), 256: (128, 64, 8, 1)},
        "grad_key_value": {64: (64, 128, 8, 2), 128: (64, 128, 8, 2), 256: (64, 64, 8, 1)},
    },
)
_SM_120 = Family(
    products="mma.sync",
    tiles={**_SM_86.tiles, "grad_key_value": {**_SM_86.tiles["grad_key_value"], 128: (64, 64, 8, 2)}},
    decode=_DESKTOPS_DECODE,
    many_rows_warps=8,  # with 4 some forms spill
)
_AMD = Family(
    products="mfma",
    tiles={
        "forward": {64: (128, 64, 8, 1), 128: (128, 32, 8, 1), 256: (64, 32, 4, 1), 512: (64, 16, 4, 1)},
        "grad_query": {64: (64, 32, 4, 1), 128: (64, 32, 4, 1), 256: (32, 32, 4, 1), 512: (64, 16, 4, 1)},
        "grad_key_value": {64: (32, 64, 4, 1), 128: (32, 32, 4, 1), 256: (16, 32, 4, 1), 512: (16, 32, 4, 1)},
        "tangent": {64: (64, 32, 4, 1), 128: (64, 16, 4, 1), 256: (32, 16, 4, 1)},
        "grad_query_second": {64: (32, 32, 4, 1), 128: (32, 16, 4, 1), 256: (16, 16, 4, 1)},
        "grad_key_value_second": {64: (16, 32, 4, 1), 128: (16, 32, 4, 1), 256: (16, 16, 4, 1)},
    },
    decode={64: (64, 4, 2), 128: (32, 4, 2), 256: (16, 4, 1), 512: (16, 4, 1), 1024: (16, 4, 1)},
    float32={64: (32, 32, 4, 1), 128: (32, 16, 4, 1), 256: (16, 16, 4, 1), 512: (16, 16, 4, 1)},
    ranges=(_AMD_RANGES, _AMD_RANGES),
)


@dataclass(frozen=True)
class Architecture:
    """An architecture's family, memories and processors.

    shared_bytes      largest shared memory of a program (CUDA C++ Programming Guide, table of compute capabilities),
                      or AMD's LDS; by default the least of all
    l2_bytes          of the smallest card that has a table (NVIDIA's architecture whitepapers), or of one of AMD's
                      dies, twice where an Infinity Cache is behind it (CDNA 2 to 4 whitepapers); by default less than
                      any
    dies              with an L2 cache each, to which the hardware deals programs in turn (CDNA 3 and 4 whitepapers)
    has_descriptors   it has a tensor memory accelerator
    warp_size         threads of a warp
    faulty_warps      numbers of warps that must not be used, and why
    """

    family: Family
    shared_bytes: int = 65536
    l2_bytes: int = 4 * 2**20
    dies: int = 1
    has_descriptors: bool = False
    warp_size: int = 32
    faulty_warps: Mapping[int, str] = field(default_factory=dict)

    @property
    def has_tensor_memory(self) -> bool:
        """True where MMAs write to tensor memory. Threads then load whole rows, and fp32 instructions are packed."""
        return self.family.products == "tcgen05"

    @property
    def has_wgmma(self) -> bool:
        return self.family.products == "wgmma"


_OTHER_BITS = {2: "gives other bits in every run on gfx950 (ROCm/triton issue 953)"}

ARCHITECTURES = {
    "80": Architecture(_SM_80, 166912, 40 * 2**20),
    "86": Architecture(_SM_86, 101376, 6 * 2**20),
    "87": Architecture(_SM_80, 166912),
    "89": Architecture(_SM_86, 101376, 48 * 2**20),
    "90": Architecture(_SM_90, 232448, 50 * 2**20, has_descriptors=True),
    "100": Architecture(_SM_100, 232448, 126 * 2**20, has_descriptors=True),
    "103": Architecture(_SM_100, 232448, has_descriptors=True),
    "120": Architecture(_SM_120, 101376, 96 * 2**20, has_descriptors=True),
    "121": Architecture(_SM_120, 101376, has_descriptors=True),
    "gfx90a": Architecture(_AMD, 65536, 8 * 2**20, warp_size=64),
    "gfx942": Architecture(_AMD, 65536, 8 * 2**20, dies=8, warp_size=64),
    "gfx950": Architecture(_AMD, 163840, 8 * 2**20, dies=8, warp_size=64, faulty_warps=_OTHER_BITS),
}


@functools.cache
def unknown(backend: str, arch: str) -> Architecture:
    """The architecture of a name that has no entry, with the least of all memories."""
    if backend == "hip":
        return Architecture(_AMD, warp_size=64 if arch.startswith("gfx9") else 32)  # CDNA; RDNA has 32
    return Architecture(_SM_86, has_descriptors=int(arch) >= 90)
