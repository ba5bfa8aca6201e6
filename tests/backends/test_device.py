"""Launches on a GPU: which code is launched again, and which calls Triton is asked to compile. Nothing is compiled."""

import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import partial
from threading import Barrier, BrokenBarrierError
from typing import Any

import pytest
import torch

triton = pytest.importorskip("triton")
from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver

from tritonattn.backends.triton import KERNELS, device, launch
from tritonattn.backends.triton.records import Strided
from tritonattn.tuning.config import Problem, TileConfig

pytestmark = pytest.mark.skipif(
    launch.interpreting or torch.cuda.is_available(), reason="the JIT is not asked, or has a driver"
)
TILES, CUDA = TileConfig(16, 64, 4, 1), torch.device("cuda", 0)


class current:
    """torch.cuda.device and the current device."""

    index = 0

    def __init__(self, device: torch.device) -> None:
        self.number = device.index

    def __enter__(self) -> None:
        self.before, current.index = current.index, self.number

    def __exit__(self, *_) -> None:
        current.index = self.before


class Driver:
    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 80, 32)

    def get_current_stream(self, device: int) -> int:
        return 7


class Kernel:
    """Triton's JIT as `device` meets it: finds code that it has compiled, by specialisation, without a lock."""

    def __init__(self, name: str) -> None:
        self.signature, self.params = KERNELS[name].signature, KERNELS[name].params
        self.compiled: dict[tuple, Code] = {}
        self.asked: list[tuple] = []
        self.compiling: Callable[[], object] = partial(time.sleep, 0.05)

    def __getitem__(self, grid: tuple):
        def run(num_warps, num_stages, enable_fp_fusion, **arguments) -> Code:
            bind = device.binder(self, triton.compiler.make_backend(GPUTarget("cuda", 80, 32)))
            key = tuple(bind(**arguments)[1])
            if key not in self.compiled:
                self.compiling()
                self.asked.append(key)
                self.compiled[key] = Code()
            return self.compiled[key]

        return run


class Code:
    """A CompiledKernel."""

    function, packed_metadata = "function", "metadata"

    def __init__(self) -> None:
        self.launched: list[tuple] = []
        self.indexed: list[tuple] = []

    def run(self, x, y, z, stream, function, metadata, record, enter, leave, *arguments) -> None:
        assert (stream, function, metadata, record, enter, leave) == (7, "function", "metadata", None, None, None)
        self.launched.append(((x, y, z), arguments))

    def __getitem__(self, grid: tuple):
        return lambda *arguments: self.indexed.append((grid, arguments))


@pytest.fixture
def kernel(monkeypatch) -> Kernel:
    monkeypatch.setattr(driver, "_active" if hasattr(driver, "_active") else "active", Driver())
    monkeypatch.setattr(torch.cuda, "device", current)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: current.index)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    return Kernel("key_statistics")


def arguments(tensor: torch.Tensor, **changed: Any) -> dict[str, Any]:
    values = dict.fromkeys(KERNELS["key_statistics"].arg_names, 5)
    return values | {"k": Strided(tensor, *tensor.stride()), "seen_ptr": None, "norms_ptr": torch.zeros(4), **changed}


K = torch.zeros(2, 3, 16, 64, dtype=torch.float16)


def test_kept_code_is_launched_unbound(kernel, monkeypatch):
    """Unless an address is no multiple of 16 bytes: then Triton's binding decides, and nothing is kept."""
    specialisation, bound, found = (
        device.Specialisation(Problem(64, 64, torch.float16), False),
        [],
        device._bound_and_launched,
    )
    monkeypatch.setattr(device, "_bound_and_launched", lambda *given: bound.append(given) or found(*given))
    odd = {"norms_ptr": torch.zeros(5)[1:]}
    for config in (TILES, TileConfig(16, 64, 8, 1)):
        for changed, binds in ((odd, 1), ({}, 1), ({"norms_ptr": torch.ones(8)}, 0), (odd, 1), ({}, 0)):
            given = arguments(K, **changed)
            given = device.KernelArguments(tuple(given), tuple(given.values()), specialisation)
            bound.clear()
            device.launch_on(CUDA, kernel, (1, 1, 1), given, config)
            assert len(bound) == binds
    assert len(kernel.asked) == 2


def test_configs_devices_and_settings_have_code_each(kernel, monkeypatch):
    taken = []
    monkeypatch.setattr(Code, "run", lambda self, *_: taken.append((self, current.index)))

    def launches() -> None:
        for config in (TILES, TileConfig(16, 64, 8, 1)):
            for index in (0, 1):
                device.launch_on(torch.device("cuda", index), kernel, (1, 1, 1), arguments(K), config)

    launches()
    assert not taken
    launches()
    assert [index for _, index in taken] == [0, 1, 0, 1]
    assert current.index == 0
    monkeypatch.setattr(triton.knobs.runtime, "debug", True)
    launches()
    assert len(taken) == 4


def test_threads_that_meet_a_kernel_together_compile_it_once(kernel, monkeypatch):
    together, binder = Barrier(4), device.binder

    def slow(*arguments: Any) -> Callable:
        time.sleep(0.02)  # all threads are here before the first is done
        return binder(*arguments)

    monkeypatch.setattr(device, "binder", slow)

    def first(step: int) -> None:
        together.wait()
        device.launch_on(CUDA, kernel, (step, 1, 1), arguments(K), TILES)

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(first, range(4)))
    assert len(kernel.asked) == 1


def test_threads_compile_different_kernels_at_once(kernel):
    together, met = Barrier(2, timeout=5), []

    def compiling() -> None:
        with suppress(BrokenBarrierError):
            met.append(together.wait())

    kernel.compiling = compiling

    def first(k: torch.Tensor) -> None:
        device.launch_on(CUDA, kernel, (1, 1, 1), arguments(k), TILES)

    with ThreadPoolExecutor(2) as pool:
        list(pool.map(first, (K, K.float())))
    assert sorted(met) == [0, 1], "one waits for the other"
