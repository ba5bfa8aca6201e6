"""Launches on a GPU: Triton compiles a kernel where a call is the first of its kind; later calls launch that code."""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from triton import knobs
from triton.compiler import CompiledKernel, make_backend
from triton.runtime import driver
from triton.runtime.jit import create_function_from_signature

from ...tuning.config import TileConfig

Arguments = dict[str, Any]
Grid = tuple[int, int, int]


class NotCompiledError(RuntimeError):
    """A kernel would have to be compiled while a CUDA graph is captured."""


def compile_options(config: TileConfig, invariant: bool = False) -> dict[str, Any]:
    """Triton's options for a config.

    The kernels write every multiply-add that matters as one, whatever Triton fuses by default; 3.9 warns where the
    option is not given. Other products and sums may be fused in the code of one mask and not in that of another:
    INVARIANT kernels fuse none.
    """
    return {"num_warps": config.num_warps, "num_stages": config.num_stages, "enable_fp_fusion": not invariant}


def launch_on(device: torch.device, kernel: Any, grid: Grid, arguments: Arguments, config: TileConfig) -> None:
    """Launch on a CUDA or HIP device, with the code that Triton compiled for a call of the same kind, or as its first.

    `kernel[grid](...)` finds that code too, in three to four times the host's time.
    """
    if torch.cuda.current_device() != device.index:
        with torch.cuda.device(device):
            return launch_on(device, kernel, grid, arguments, config)
    code, values = _code_of(kernel, config, device.index), tuple(arguments.values())
    _, specialization, _ = code.bind(*values)
    kind = (*specialization, *_switches())
    compiled = code.compiled.get(kind)
    if compiled is not None:
        _launch(compiled, grid, device.index, values)
        return
    with _one_compilation_at_a_time, _no_compilation_in_capture(kernel):
        compiled = kernel[grid](**arguments, **compile_options(config, arguments.get("INVARIANT", False)))
    if compiled is not None:  # a hook of Triton's may refuse to compile
        code.compiled[kind] = compiled


def _launch(compiled: CompiledKernel, grid: Grid, device: int, values: tuple[Any, ...]) -> None:
    """`compiled[grid](*values)`, without the record that it makes for hooks where there are none."""
    enter: Any = knobs.runtime.launch_enter_hook  # a chain of hooks, in older versions a hook or None
    leave: Any = knobs.runtime.launch_exit_hook
    if getattr(enter, "calls", enter) or getattr(leave, "calls", leave):
        compiled[grid](*values)
        return
    run: Any = compiled.run
    stream = _driver().get_current_stream(device)
    run(*grid, stream, compiled.function, compiled.packed_metadata, None, None, None, *values)


class _Code(NamedTuple):
    """The code of a kernel with one config on one device.

    bind       Triton's own function from arguments to types, constants and alignments, which select code
    compiled   code by these
    """

    bind: Callable
    compiled: dict[tuple, CompiledKernel]


@functools.cache
def _code_of(kernel: Any, config: TileConfig, device: int) -> _Code:
    return _Code(binder(kernel, make_backend(_driver().get_current_target())), {})


def _driver() -> Any:
    return driver.active


def binder(kernel: Any, backend: Any) -> Callable:
    """Triton's function from a kernel's arguments to (arguments by name, their specialisation, other options)."""
    return create_function_from_signature(kernel.signature, kernel.params, backend)


def _switches() -> tuple[Any, ...]:
    """Settings of the process that select code beside arguments and config; older versions of Triton lack some."""
    return (
        knobs.runtime.debug,
        getattr(knobs.runtime, "add_stages_inspection_hook", None),
        getattr(knobs.compilation, "instrumentation_mode", None),
        getattr(knobs.compilation, "fpsan_homomorphic_casts", None),
    )


# Threads that meet a new kernel together would each compile it; and two that capture would leave a hook behind.
_one_compilation_at_a_time = threading.RLock()


@contextmanager
def _no_compilation_in_capture(kernel: Any) -> Iterator[None]:
    """While a CUDA graph is captured, a kernel that is not compiled is refused: loading code would end the capture."""
    if not torch.cuda.is_current_stream_capturing():
        yield
        return

    def refuse(*arguments: Any, **options: Any) -> Any:
        if torch.cuda.is_current_stream_capturing():  # not where another thread compiles meanwhile
            raise NotCompiledError(
                f"{kernel.__name__}: expected a compiled kernel while a CUDA graph is captured, got one to compile: "
                "call tritonattn.warmup, or the function itself, with the same shapes, dtype and options before"
            )
        return None if before is None else before(*arguments, **options)

    with _one_compilation_at_a_time:
        before, knobs.runtime.jit_cache_hook = knobs.runtime.jit_cache_hook, refuse
        try:
            yield
        finally:
            knobs.runtime.jit_cache_hook = before
