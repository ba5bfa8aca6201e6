"""A launch as the driver got it: its raw parameters must be those of the kernel's arguments."""

from __future__ import annotations

import struct
from collections.abc import Iterator
from typing import Any, NamedTuple

from ptx_emulator.compile import Argument, at_run_time
from ptx_emulator.tensor_map import MAP_BYTES, host_map
from torch import Tensor

_FLOATS = {"fp16": "<e", "fp32": "<f", "fp64": "<d"}
_MARK = 8  # bytes at the end of a map by which the driver knows it


class Launched(NamedTuple):
    """A launch that reached the driver.

    kernel      Triton's CompiledKernel
    arguments   tensors, numbers and TensorDescriptors in the order of the parameters; names: of every parameter's
    """

    kernel: Any
    grid: tuple[int, int, int]
    arguments: list[Any]
    names: list[str]

    @property
    def name(self) -> str:
        return self.kernel.metadata.name


class Parameters(NamedTuple):
    """The raw parameters of a launch: their bytes without gaps, and the size of each as the cubin says."""

    raw: bytes
    sizes: list[int]

    def parts(self) -> Iterator[bytes]:
        at = 0
        for size in self.sizes:
            yield self.raw[at : at + size]
            at += size


def launched(
    kernel: Any, grid: tuple[int, int, int], given: dict[str, Any], threads: int, shared: int, parameters: Parameters
) -> Launched:
    """The launch of a kernel with the arguments given; AssertionError where the driver was handed anything else."""
    arguments = list(at_run_time(kernel.src.signature, given))
    metadata = kernel.metadata
    assert (threads, shared) == (32 * metadata.num_warps, metadata.shared), (threads, shared, metadata)
    expected = list(_expected(arguments, metadata))
    parts = list(parameters.parts())
    scratch = parts[len(expected) :]
    assert all(len(part) == 8 for part in scratch), f"{metadata.name}: {len(expected)} parameters expected"
    wanted = [getattr(metadata, f"{name}_scratch_size", 0) for name in ("global", "profile")]
    assert any(wanted) or not any(map(any, scratch)), "scratch memory that none asked for"
    for (name, value), part in zip(expected, parts, strict=False):
        found = part[:-_MARK] if len(part) == MAP_BYTES else part
        assert found == value, f"{metadata.name}, {name}: expected the bytes {value.hex()}, got {found.hex()}"
    return Launched(kernel, grid, [one.value for one in arguments], [name for name, _ in expected])


def _expected(arguments: list[Argument], metadata: Any) -> Iterator[tuple[str, bytes]]:
    """Name and bytes of each parameter: a descriptor's are its map, its sizes and its strides."""
    layouts = list(getattr(metadata, "tensordesc_meta", None) or ())
    for name, value, type_ in arguments:
        if type_.startswith("tensordesc"):
            yield name, bytes(host_map(value.base.data_ptr(), value, layouts.pop(0)))[:-_MARK]
            yield from ((name, struct.pack("<i", size)) for size in value.shape)
            yield from ((name, struct.pack("<q", stride)) for stride in value.strides)
        else:
            yield name, _encoded(value, type_)


def _encoded(value: Any, type_: str) -> bytes:
    """The bytes of an argument of one of Triton's types: "*bf16", "i32", "u1", "fp32", ..."""
    if isinstance(value, Tensor):
        assert type_.startswith("*"), f"a tensor where {type_} is expected"
        return struct.pack("<Q", value.data_ptr())
    if type_ in _FLOATS:
        return struct.pack(_FLOATS[type_], value)
    size = max(int(type_[1:]) // 8, 1)
    return (int(value) & ((1 << 8 * size) - 1)).to_bytes(size, "little")
