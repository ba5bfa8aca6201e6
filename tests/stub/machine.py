"""The devices that the stub library shows to Triton and torch."""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from triton import knobs
from triton.backends.nvidia.driver import CudaDriver
from triton.compiler import CompiledKernel
from triton.runtime import driver

from tritonattn.backends.triton import launch
from tritonattn.tuning.config import Target, TileConfig

from .launched import Launched, Parameters, launched
from .library import LaunchCallback, State, built, loaded

# Compute capabilities and names, by device.
DEVICES = (
    (80, "NVIDIA A100-SXM4-80GB"),
    (86, "NVIDIA A10"),
    (89, "NVIDIA L40S"),
    (90, "NVIDIA H100 80GB HBM3"),
    (90, "NVIDIA H100 80GB HBM3"),
    (100, "NVIDIA B200"),
    (120, "NVIDIA GeForce RTX 5090"),
)
_NOT_PERMITTED = 800  # CUDA_ERROR_NOT_PERMITTED


class Stub:
    """Triton's CudaDriver on a stub libcuda. `driver` and `library` are for direct calls.

    index         the current device
    streams       the stream on which Triton launches, by device; 0 is the default stream
    is_capturing  torch says that a CUDA graph is captured
    """

    def __init__(self) -> None:
        folder = built()
        self.library = loaded(folder)
        self.index, self.is_capturing = 0, False
        self.streams = [0] * len(DEVICES)
        self._kernels: dict[int, Any] = {}  # by function handle
        self._given: tuple[Any, dict[str, Any]] | None = None
        self._on_launch: Callable[[Launched], None] | None = None
        self._failure: BaseException | None = None
        self._callback = LaunchCallback(self._launched)  # kept: the library calls it
        self._state.devices = len(DEVICES)
        self._state.capability[: len(DEVICES)] = [capability for capability, _ in DEVICES]
        knobs.nvidia.libcuda_path = str(folder)
        with self._torch_cuda():
            self.driver = CudaDriver()
        self.driver.get_current_stream = lambda index: self.streams[index]
        # For good: kernels are unloaded by the driver that is active when Python ends.
        driver.set_active(self.driver)
        _keep_kernels(self._kernels)

    @property
    def _state(self) -> State:
        return self.library.stub_state().contents

    def messages(self) -> list[str]:
        """The calls that the library has refused so far, with reasons."""
        return self._state.messages.decode().splitlines()

    def count(self, what: str) -> int:
        """Calls so far: "launches", "maps", "loads", "attributes", "pointer_queries", "context_switches", ..."""
        return getattr(self._state, what)

    @contextmanager
    def active(self, capability: int, on_launch: Callable[[Launched], None] | None = None) -> Iterator[None]:
        """Launch on the first device of this compute capability; CPU tensors are its memory.

        on_launch   called with each launch, whose parameters have been compared; None: launches are not looked at
        """
        with self._torch_cuda() as patch:
            patch.setattr(launch, "run", self.run)
            patch.setattr(launch, "device_of", lambda values: torch.device("cuda", self.index))
            patch.setattr(
                Target, "of", lambda device: Target("cuda", str(DEVICES[self.index][0]), DEVICES[self.index][1])
            )
            self._use([one for one, _ in DEVICES].index(capability))
            self.watch(on_launch)
            try:
                yield
            finally:
                self.watch(None)
                self._use(0)

    def watch(self, on_launch: Callable[[Launched], None] | None) -> None:
        """Hand launches to a function from now on, or to none."""
        self._on_launch = on_launch
        self.library.stub_on_launch(self._callback if on_launch else LaunchCallback())

    def run(self, kernel: Any, grid: launch.Grid, arguments: Mapping[str, Any], config: TileConfig) -> None:
        """An executor: `launch.run_on_device`, which raises what `on_launch` raised."""
        self._given = kernel, arguments
        try:
            launch.run_on_device(kernel, grid, arguments, config)
        finally:
            self._given = None
            failure, self._failure = self._failure, None
            if failure is not None:
                raise failure

    def _launched(self, function: int, grid: Any, threads: int, shared: int, parameters: Any, size: int) -> int:
        try:
            assert self._given is not None, "a launch past launch.run"
            sizes = (ctypes.c_uint * 256)()
            count = self.library.stub_parameters(function, sizes)
            given = Parameters(ctypes.string_at(parameters, size), list(sizes[:count]))
            one = launched(self._kernels[function], tuple(grid[:3]), self._given[1], threads, shared, given)
            if self._on_launch is not None:
                self._on_launch(one)
        except BaseException as error:  # it cannot pass through C
            self._failure = error
            return _NOT_PERMITTED
        return 0

    def _use(self, index: int) -> int:
        """Make a device current; the one before."""
        before = self.index
        if index >= 0:
            self.library.cuCtxSetCurrent(index + 1)
            self.index = index
        return before

    def _asked_for_capture(self) -> bool:
        """Calls of the runtime that ask about a stream make the device's primary context current."""
        self._use(self.index)
        return self.is_capturing

    @contextmanager
    def _torch_cuda(self) -> Iterator[pytest.MonkeyPatch]:
        """torch.cuda as on this machine."""

        def number(device: Any) -> int:
            index = device if device is None or isinstance(device, int) else torch.device(device).index
            return self.index if index is None else index

        functions: dict[str, Callable[..., Any]] = {
            "current_device": lambda: self.index,
            # As in torch 2.8, which skips a device that is current by number; from 2.9 on it makes the context.
            "set_device": lambda device: number(device) == self.index or self._use(number(device)),
            "_exchange_device": self._use,
            "_maybe_exchange_device": lambda index: self._use(index),  # torch.compile tells the two apart
            "get_device_capability": lambda device=None: divmod(DEVICES[number(device)][0], 10),
            "get_device_name": lambda device=None: DEVICES[number(device)][1],
            "is_current_stream_capturing": self._asked_for_capture,
        }
        with pytest.MonkeyPatch.context() as patch:
            for name, function in functions.items():
                patch.setattr(torch.cuda, name, function)
            yield patch


def _keep_kernels(kernels: dict[int, Any]) -> None:
    """From now on, note each kernel that is loaded by the handle of its function."""
    load = CompiledKernel._init_handles

    def loading(kernel: Any) -> None:
        load(kernel)
        kernels[kernel.function] = kernel

    CompiledKernel._init_handles = loading


@functools.cache
def installed() -> Stub:
    """The stub of this process. From then on it has Triton's active driver."""
    return Stub()
