"""Launches are handed on with the arguments that the driver got, and refused where these are not the caller's."""

from __future__ import annotations

from typing import Any, NamedTuple

import pytest
import torch
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

from tritonattn.backends.triton import device, launch
from tritonattn.tuning import TileConfig

CONFIG = TileConfig(16, 16, 4, 1)


class Rows(NamedTuple):
    ptr: Any
    stride: Any


@triton.jit
def scaled(rows, x_descriptor, nothing, factor, shift, count, COLUMNS: tl.constexpr):
    x = x_descriptor.load([0, 0]).to(tl.float32) * factor + shift
    offs = tl.arange(0, 16)
    places = offs[:, None] * rows.stride + tl.arange(0, COLUMNS)[None, :]
    tl.store(rows.ptr + places, x, mask=offs[:, None] < count)


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
    own = launch.run_on_device
    monkeypatch.setattr(
        launch,
        "run_on_device",
        lambda kernel, grid, given, config: own(kernel, grid, {**given, **change(given)}, config),
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
