"""Calls that NVIDIA's driver refuses, and so does the stub."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import pytest
import torch
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

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


def test_shared_memory_that_was_not_opted_in(stub, x, monkeypatch):
    with stub.active(90):
        kernel = changed(monkeypatch, launched(x), warps=4, shared=60_000)
        message = refused(stub, lambda: launch_again(kernel, x))
        assert message == "copy: 60000 bytes of shared memory of 49152 that were opted in"


def test_more_warps_than_a_kernel_was_compiled_for(stub, x, monkeypatch):
    with stub.active(90):
        kernel = changed(monkeypatch, launched(x), warps=8, shared=0)
        message = refused(stub, lambda: launch_again(kernel, x))
        assert message == "copy: 256 threads of 128"


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
    of, place = SOUND | change, torch.empty(256, dtype=torch.uint8)
    with stub.active(of["capability"]):
        before = len(stub.messages())
        code = stub.library.cuTensorMapEncodeTiled(
            ctypes.c_void_p((place.data_ptr() + 63) // 64 * 64),
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
