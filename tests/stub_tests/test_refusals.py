"""Calls that NVIDIA's driver refuses, and launches with other arguments than the caller's."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any, NamedTuple

import pytest
import torch
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

from tritonattn.backends.triton import device, launch
from tritonattn.tuning import TileConfig

BLOCK = 1024
OPTIONS = {"num_warps": 4, "enable_fp_fusion": True}


@triton.jit
def copy(x_ptr, y_ptr, n, BLOCK: tl.constexpr):
    offs = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(y_ptr + offs, tl.load(x_ptr + offs, mask=offs < n), mask=offs < n)


@triton.jit
def copy_by_descriptor(x_descriptor, y_ptr):
    x = x_descriptor.load([0, 0])
    tl.store(y_ptr + tl.arange(0, 16)[:, None] * 64 + tl.arange(0, 64)[None, :], x)


@pytest.fixture
def x():
    return torch.zeros(4096, dtype=torch.bfloat16)


def launched(x, grid=(4,)) -> Any:
    """The kernel `copy`, after a launch."""
    return copy[grid](x, torch.empty_like(x), x.numel(), BLOCK, **OPTIONS)


def launch_again(kernel: Any, x) -> None:
    kernel[(1, 1, 1)](x, torch.empty_like(x), x.numel(), BLOCK)


def changed(monkeypatch, kernel: Any, warps: int, shared: int) -> Any:
    """The kernel, to be launched on this many warps and bytes of shared memory."""
    monkeypatch.setattr(kernel, "packed_metadata", (warps, 1, shared, *kernel.packed_metadata[3:]))
    return kernel


def refused(stub, call: Callable[[], object]) -> str:
    """The one message of the stub about a call that raises."""
    before = len(stub.messages())
    with pytest.raises(RuntimeError, match="Triton Error"):
        call()
    [message] = stub.messages()[before:]
    return message


def test_a_launch_passes(stub, x):
    with stub.active(80):
        before = stub.count("launches")
        launched(x)
        assert stub.count("launches") == before + 1


def test_a_long_axis_of_the_grid(stub, x):
    with stub.active(80):
        assert refused(stub, lambda: launched(x, (1, 65_536))) == "copy: grid 1 x 65536 x 1"


def test_a_kernel_of_another_device(stub, x):
    with stub.active(90):
        kernel = launched(x)
        with torch.cuda.device(4):
            assert refused(stub, lambda: launch_again(kernel, x)) == "copy: loaded on device 3, launched on 4"


@pytest.mark.parametrize(
    ("warps", "shared", "message"),
    [(4, 60_000, "60000 bytes of shared memory of 49152 that were opted in"), (8, 0, "256 threads of 128")],
)
def test_more_memory_or_warps_than_a_kernel_has(warps, shared, message, stub, x, monkeypatch):
    with stub.active(90):
        kernel = changed(monkeypatch, launched(x), warps=warps, shared=shared)
        assert refused(stub, lambda: launch_again(kernel, x)) == f"copy: {message}"


def test_a_stream_of_another_device(stub, x, monkeypatch):
    monkeypatch.setattr(stub, "streams", [stub.library.stub_stream(4)] * 7)
    with stub.active(90):
        assert refused(stub, lambda: launched(x)) == "copy: stream of device 4 on 3"


def test_streams_of_the_current_device(stub, x, monkeypatch):
    monkeypatch.setattr(stub, "streams", [stub.library.stub_stream(device) for device in range(7)])
    with stub.active(90):
        for device in (0, 3, 4):
            with torch.cuda.device(device):
                launched(x)


def test_code_of_another_architecture(stub, x):
    with stub.active(90):
        code = launched(x).asm["cubin"]
        with torch.cuda.device(0):
            load = partial(stub.driver.utils.load_binary, "copy", code, 0, 0)
            assert refused(stub, load) == "cubin of sm_90 on sm_80"


def test_a_descriptor_passes(stub, x):
    with stub.active(90):
        before = stub.count("maps")
        copy_by_descriptor[(1,)](TensorDescriptor(x, [64, 64], [64, 1], [16, 64]), torch.empty_like(x), **OPTIONS)
        assert stub.count("maps") == before + 1


def test_a_descriptor_in_a_thread_without_a_context(stub, x):
    descriptor = TensorDescriptor(x, [64, 64], [64, 1], [16, 64])
    with stub.active(90), ThreadPoolExecutor(1) as fresh:
        kernel = copy_by_descriptor[(1,)](descriptor, torch.empty_like(x), **OPTIONS)
        launched = partial(fresh.submit, kernel[1, 1, 1], descriptor, torch.empty_like(x))
        assert refused(stub, lambda: launched().result()) == "tensor map without a context"


BFLOAT16, SWIZZLE_128 = 9, 3
SOUND = {"shift": 0, "strides": (128,), "shape": (64, 64), "box": (64, 16), "capability": 90}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"shift": 2}, "is not a multiple of 16 bytes"),
        ({"strides": (130,)}, "stride 130 of axis 1"),
        ({"strides": (2**40,)}, "stride 1099511627776 of axis 1"),
        ({"shape": (64, 0)}, "size 0 of axis 1"),
        ({"box": (64, 512)}, "box of 512 on axis 1"),
        ({"box": (128, 16)}, "inner box of 256 bytes, swizzle of 128"),
        ({"capability": 80}, "tensor map on sm_80"),
        ({}, None),
    ],
    ids=str,
)
def test_tensor_maps(change, message, stub, x):
    """Axes are innermost first, strides in bytes."""
    of, memory = SOUND | change, torch.empty(256, dtype=torch.uint8)
    with stub.active(of["capability"]):
        before = len(stub.messages())
        code = stub.library.cuTensorMapEncodeTiled(
            ctypes.c_void_p((memory.data_ptr() + 63) // 64 * 64),
            BFLOAT16,
            2,
            ctypes.c_void_p(x.data_ptr() + of["shift"]),
            (ctypes.c_uint64 * 2)(*of["shape"]),
            (ctypes.c_uint64 * 1)(*of["strides"]),
            (ctypes.c_uint32 * 2)(*of["box"]),
            (ctypes.c_uint32 * 2)(1, 1),
            *(0, SWIZZLE_128, 0, 0),
        )
        assert (code != 0) == (message is not None)
        assert [message in one for one in stub.messages()[before:]] == [True] * bool(message)


CONFIG = TileConfig(16, 16, 4, 1)


class Rows(NamedTuple):
    ptr: Any
    stride: Any


@triton.jit
def scaled(rows, x_descriptor, nothing, factor, shift, count, COLUMNS: tl.constexpr):
    x = x_descriptor.load([0, 0]).to(tl.float32) * factor + shift
    offs = tl.arange(0, 16)
    offsets = offs[:, None] * rows.stride + tl.arange(0, COLUMNS)[None, :]
    tl.store(rows.ptr + offsets, x, mask=offs[:, None] < count)


def described(x: torch.Tensor, rows: int = 16, stride: int = 64) -> TensorDescriptor:
    return TensorDescriptor(x, [rows, 64], [stride, 1], [16, 64])


@pytest.fixture
def arguments():
    x, y = torch.ones(16, 64, dtype=torch.bfloat16), torch.zeros(16, 70)
    return {
        "rows": Rows(y, y.stride(0)),
        "x_descriptor": described(x),
        "nothing": None,
        "factor": 0.3,
        "shift": -(2**40) - 5,
        "count": 12,
        "COLUMNS": 64,
    }


def test_launches_are_handed_on(arguments, stub):
    seen = []
    with stub.active(90, seen.append):
        stub.run(scaled, (3, 2, 1), arguments, CONFIG)
    [one] = seen
    assert (one.name, one.grid) == ("scaled", (3, 2, 1))
    rows, descriptor = arguments["rows"], arguments["x_descriptor"]
    assert one.arguments[0] is rows.ptr
    assert one.arguments[1:] == [70, descriptor, 0.3, -(2**40) - 5, 12]
    of_descriptor = ["x_descriptor"] * 5  # its map, two sizes and two strides
    assert one.names == ["rows.ptr", "rows.stride", *of_descriptor, "factor", "shift", "count"]


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("rows.ptr", lambda given: {"rows": Rows(torch.zeros(16, 70), 70)}),
        ("rows.stride", lambda given: {"rows": Rows(given["rows"].ptr, 71)}),
        ("x_descriptor", lambda given: {"x_descriptor": described(torch.ones(16, 64, dtype=torch.bfloat16))}),
        ("x_descriptor", lambda given: {"x_descriptor": described(given["x_descriptor"].base, rows=15)}),
        ("x_descriptor", lambda given: {"x_descriptor": described(given["x_descriptor"].base, stride=56)}),
        ("factor", lambda given: {"factor": 0.30001}),
        ("shift", lambda given: {"shift": -(2**40) - 4}),
        ("count", lambda given: {"count": 13}),
    ],
)
def test_other_parameters_than_those_of_the_call(name, change, arguments, stub, monkeypatch):
    """As from a launcher that keeps an argument of an earlier call."""
    run = launch.run_on_device
    monkeypatch.setattr(
        launch,
        "run_on_device",
        lambda kernel, grid, given, config: run(kernel, grid, {**given, **change(given)}, config),
    )
    seen = []
    with stub.active(90, seen.append), pytest.raises(AssertionError, match=f"scaled, {name}: expected the bytes"):
        stub.run(scaled, (1, 1, 1), arguments, CONFIG)
    assert seen == []


def test_a_launch_past_the_executor(arguments, stub):
    with stub.active(90, lambda one: None), pytest.raises(RuntimeError, match="Triton Error"):
        scaled[(1,)](**arguments, **device.compile_options(CONFIG))


def test_errors_of_the_function_that_launches_are_handed_to(arguments, stub):
    def refuse(one) -> None:
        raise ValueError("it ran wrong")

    with stub.active(90, refuse), pytest.raises(ValueError, match="it ran wrong"):
        stub.run(scaled, (1, 1, 1), arguments, CONFIG)
