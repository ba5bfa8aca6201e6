"""One attention, three ways: kernels, PyTorch on a CPU, and the eager reference."""

from __future__ import annotations

import functools
from typing import Any


@functools.cache
def kernels() -> Any:
    """The "triton" backend, imported at first use: triton may be missing."""
    from . import triton

    return triton
