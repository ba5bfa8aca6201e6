"""Launches on a GPU: Triton compiles a kernel for the first call of a specialisation; later calls launch that code."""

from __future__ import annotations

import functools
import itertools
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor
from triton import knobs
from triton.compiler import CompiledKernel, make_backend
from triton.runtime import driver

from ...core.private_names import private
from ...tuning.config import REGISTERS, Problem, TileConfig
from ...tuning.order import LONGEST_AXIS

_create_function_from_signature = private("triton.runtime.jit.create_function_from_signature")

Grid = tuple[int, int, int]
# Programs of a grid: the launcher of Triton multiplies its axes in 32 bits, and skips a launch with a negative product.
MOST_PROGRAMS = 2**31 - 1


def grids_of(x: int, y: int, z: int) -> Iterable[tuple[Grid, int, int]]:
    """The grids of a grid's launches, each with its first position on the second and the third axis."""
    most = MOST_PROGRAMS // max(x, 1)
    y_step = max(1, min(y, LONGEST_AXIS, most))
    z_step = max(1, min(z, LONGEST_AXIS, most // y_step))
    firsts = itertools.product(range(0, z, z_step), range(0, y, y_step))
    return (((x, min(y - first_y, y_step), min(z - first_z, z_step)), first_y, first_z) for first_z, first_y in firsts)


class NotCompiledError(RuntimeError):
    """A kernel would have to be compiled while a CUDA graph is captured."""


@dataclass(eq=False, slots=True)
class KernelArguments(Mapping[str, Any]):
    """A kernel's arguments in its order, and the specialisation of the call that they belong to, or None.

    A launch on a device reads the values alone, so that no dict is made of them.
    """

    _names: tuple[str, ...]
    _values: tuple[Any, ...]
    specialisation: Specialisation | None

    def __getitem__(self, name: str) -> Any:
        if name not in self._names:
            raise KeyError(name)
        return self._values[self._names.index(name)]

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)

    def values(self) -> tuple[Any, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        return self._values


@dataclass(frozen=True, eq=False)
class Specialisation:
    """Calls that differ in addresses, and in numbers that select no code: one `Problem`, and one code of each kernel.

    wide        `launch.is_wide` of its tensors
    codes       by kernel, config, device and settings, code for arguments whose addresses are all multiples of 16
    in_splits   the same calls where several programs share a block's work, whose results are parts
    """

    problem: Problem
    wide: bool
    codes: dict[tuple, KeptCode] = field(default_factory=dict)

    @functools.cached_property
    def in_splits(self) -> Specialisation:
        return Specialisation(self.problem, self.wide)


class KeptCode(NamedTuple):
    """Code, and where its tensors stand: an argument, a field of a record, or one of a record in a record.

    kernel   keeps its id
    """

    compiled: CompiledKernel
    tensors: tuple[int, ...]
    in_records: tuple[tuple[int, int], ...]
    in_terms: tuple[tuple[int, int, int], ...]
    kernel: Any

    def takes(self, values: tuple[Any, ...]) -> bool:
        """True where all addresses are multiples of 16 bytes."""
        address = 0
        for i in self.tensors:
            address |= values[i].data_ptr()
        for i, j in self.in_records:
            address |= values[i][j].data_ptr()
        for i, j, k in self.in_terms:
            address |= values[i][j][k].data_ptr()
        return address % 16 == 0


def kept_code(compiled: CompiledKernel, values: tuple[Any, ...], kernel: Any) -> KeptCode:
    places = tuple(_tensors_in(values))
    tensors, in_records, in_terms = (tuple(at for at in places if len(at) == depth) for depth in (1, 2, 3))
    return KeptCode(compiled, tuple(i for (i,) in tensors), in_records, in_terms, kernel)


def _tensors_in(values: tuple[Any, ...]) -> Iterator[tuple[int, ...]]:
    for i, value in enumerate(values):
        if isinstance(value, Tensor):
            yield (i,)
        elif isinstance(value, tuple):
            yield from ((i, *at) for at in _tensors_in(value))


def compile_options(config: TileConfig, invariant: bool = False) -> dict[str, Any]:
    """Triton's options for a config.

    The kernels write every multiply-add that matters as one, whatever Triton fuses by default; 3.9 warns where the
    option is not given. Other products and sums may be fused in the code of one mask and not in that of another:
    INVARIANT kernels fuse none.
    """
    options = {"num_warps": config.num_warps, "num_stages": config.num_stages, "enable_fp_fusion": not invariant}
    if config.waves_per_eu:
        options["waves_per_eu"] = config.waves_per_eu
    return options if config.kernel == "triton" else options | {"maxnreg": REGISTERS[config.block_m]}


class _Thread(threading.local):
    """A thread has a CUDA context from its first CUDA call on. Triton makes one, but encodes tensor maps before."""

    has_context = False


_thread = _Thread()


def launch_on(
    device: torch.device, kernel: Any, grid: Grid, arguments: Mapping[str, Any], config: TileConfig
) -> CompiledKernel | None:
    """Launch on a CUDA or HIP device: the code that Triton compiled for the specialisation, or as its first call.

    `kernel[grid](...)` finds that code too, in three to four times the host's time. Returns the code of a first call.
    """
    if torch.cuda.current_device() != device.index:
        with torch.cuda.device(device):
            return launch_on(device, kernel, grid, arguments, config)
    if not _thread.has_context:
        torch.cuda.set_device(device)
        torch.cuda.is_current_stream_capturing()  # torch 2.8 skips set_device of a current device, but not this
        _thread.has_context = True
    values, switches = tuple(arguments.values()), _switches()
    specialisation: Specialisation | None = getattr(arguments, "specialisation", None)
    key = (id(kernel), config, device.index, *switches)
    if specialisation is not None and (kept := specialisation.codes.get(key)) and kept.takes(values):
        _launch(kept.compiled, grid, device.index, values)
        return None
    compiled = _bound_and_launched(device.index, kernel, grid, arguments, config, switches)
    if specialisation is not None and compiled is not None:
        kept = kept_code(compiled, values, kernel)
        if kept.takes(values):
            specialisation.codes[key] = kept
            return compiled
    return None


def _bound_and_launched(
    device: int, kernel: Any, grid: Grid, arguments: Mapping[str, Any], config: TileConfig, switches: tuple[Any, ...]
) -> CompiledKernel | None:
    """The code that was launched, found by Triton's binding of the arguments."""
    code, values = _code_of(kernel, config, device), tuple(arguments.values())
    _, specialization, _ = code.bind(*values)
    key = (*specialization, *switches)
    compiled = code.compiled.get(key)
    if compiled is not None:
        _launch(compiled, grid, device, values)
        return compiled
    with code.locks.setdefault(key, threading.Lock()), _no_compilation_in_capture(kernel):
        compiled = kernel[grid](**arguments, **compile_options(config, arguments.get("INVARIANT", False)))
    if compiled is not None:  # a hook of Triton's may refuse to compile
        code.compiled[key] = compiled
    return compiled


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

    bind       Triton's function from arguments to types, constants and alignments, which select code
    compiled   code by these
    locks      by these: threads that meet a new kernel together would each compile it
    """

    bind: Callable
    compiled: dict[tuple, CompiledKernel]
    locks: dict[tuple, threading.Lock]


_codes: dict[tuple[Any, TileConfig, int], _Code] = {}


def _code_of(kernel: Any, config: TileConfig, device: int) -> _Code:
    """The code of a kernel in a config, one for all threads: two made at once would each have locks."""
    key = (kernel, config, device)
    if key not in _codes:
        _codes.setdefault(key, _Code(binder(kernel, make_backend(_driver().get_current_target())), {}, {}))
    return _codes[key]


def _driver() -> Any:
    return driver.active


def binder(kernel: Any, backend: Any) -> Callable:
    """Triton's function from a kernel's arguments to (arguments by name, their specialisation, other options)."""
    return _create_function_from_signature(kernel.signature, kernel.params, backend)


def _switches() -> tuple[Any, ...]:
    """Settings of the process that select code besides arguments and config; older versions of Triton lack some."""
    return (
        knobs.runtime.debug,
        getattr(knobs.runtime, "add_stages_inspection_hook", None),
        getattr(knobs.compilation, "instrumentation_mode", None),
        getattr(knobs.compilation, "fpsan_homomorphic_casts", None),
    )


_one_capture_at_a_time = threading.Lock()  # two would leave a hook behind


@contextmanager
def _no_compilation_in_capture(kernel: Any) -> Iterator[None]:
    """Refuse a kernel that is not compiled while a CUDA graph is captured: loading code would end the capture."""
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

    with _one_capture_at_a_time:
        before, knobs.runtime.jit_cache_hook = knobs.runtime.jit_cache_hook, refuse
        try:
            yield
        finally:
            knobs.runtime.jit_cache_hook = before
