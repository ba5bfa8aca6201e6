"""Tile configs: what a kernel may be compiled with, what it is compiled with, and compilation without a GPU.

`record` keeps which calls a program makes, for `tritonattn tune --calls`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from .calls import Calls, record
from .config import Problem, Target, TileConfig, legal_reasons
from .defaults import default_config

if TYPE_CHECKING:
    from ..backends.triton.compile import compile_kernel

__all__ = ["Calls", "Problem", "Target", "TileConfig", "compile_kernel", "default_config", "legal_reasons", "record"]


def __getattr__(name: str):
    if name == "compile_kernel":  # needs triton
        from ..backends.triton.compile import compile_kernel

        return compile_kernel
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
