"""Sanitizers of Triton, which it compiles into kernels."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
import triton
from triton import knobs
from triton.runtime import _allocation

# consan: reads and writes of shared memory by asynchronous copies and products that no barrier orders.
INSTRUMENTS = ("consan",)


def obstacle(name: str) -> str | None:
    """Say why this version of Triton has no such sanitizer for the current GPU: LLVM aborts on cards before sm_90."""
    is_able = torch.cuda.is_available() and not torch.version.hip and torch.cuda.get_device_capability()[0] >= 9
    if is_able and hasattr(knobs.compilation, "instrumentation_mode"):
        return None
    return f"this triton has no {name} for this device"


@contextmanager
def instrumented(name: str | None) -> Iterator[None]:
    """Compile kernels with a sanitizer inside, which traps where it finds something; it wants memory of the GPU's."""
    if name is None:
        yield
        return
    device = "cuda" if torch.cuda.is_available() else "cpu"  # of a stub driver

    def allocate(size: int, alignment: int, stream: int | None) -> torch.Tensor:
        return torch.zeros(size, dtype=torch.int8, device=device)

    triton.set_allocator(allocate)
    if hasattr(_allocation, "set_profile_allocator"):
        _allocation.set_profile_allocator(allocate)
    before, knobs.compilation.instrumentation_mode = knobs.compilation.instrumentation_mode, name
    try:
        yield
    finally:
        knobs.compilation.instrumentation_mode = before
