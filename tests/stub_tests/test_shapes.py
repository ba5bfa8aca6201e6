"""Launches of unusual shapes and layouts: the driver takes each, with the parameters of the call. No kernel runs."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

import tritonattn
from tests.support.shells import leave_bodies_out
from tests.support.tiles import quick_config
from tritonattn.backends.triton import launch


@pytest.fixture
def launches(stub, monkeypatch, tmp_path) -> list:
    """Launches so far, of small tiles without their bodies, which compile quickly."""
    leave_bodies_out(monkeypatch, tmp_path)
    monkeypatch.setattr(launch, "config_for", quick_config)
    return []


def normal(*shape: int) -> Tensor:
    return torch.randn(shape).bfloat16()


def train(q: Tensor, k: Tensor, v: Tensor, **options: Any) -> None:
    """A call and its backward pass."""
    leaves = [x.detach().requires_grad_() for x in (q, k, v)]
    out = tritonattn.attention(*leaves, backend="triton", **options)
    torch.autograd.grad(out, leaves, torch.ones_like(out))


def odd_layouts() -> None:
    """Rows across memory, an address off by one, and a head dim of one."""
    q, k = normal(1, 2, 17, 40).transpose(2, 3), normal(2 * 40 * 17 + 1)[1:].view(1, 2, 40, 17)
    train(q, k, normal(1, 2, 40, 1))


def an_expanded_gradient() -> None:
    q = normal(1, 2, 24, 16).requires_grad_()
    tritonattn.attention(q, q, q, backend="triton").sum().backward()


def more_heads_than_an_axis() -> None:
    train(*normal(3, 1, 70_000, 2, 16))


def a_longer_batch_than_an_axis() -> None:
    tritonattn.attention(*normal(3, 70_000, 1, 2, 16), backend="triton")


def nothing() -> None:
    for shape in ((0, 2, 8, 16), (1, 2, 0, 16), (1, 0, 8, 16)):
        train(*normal(3, *shape), scaling="key_norm_sum", causal=True)
    for rows, keys in ((8, 0), (0, 8)):
        train(normal(1, 2, rows, 16), *normal(2, 1, 2, keys, 16))


def a_long_cache() -> None:
    keys = normal(1, 1, 1, 16).expand(1, 1, 2**20, 16)
    tritonattn.attention_decode(normal(1, 1, 1, 16), keys, keys, key_lengths=torch.tensor([2**20]), backend="triton")


def strides_past_int32() -> None:
    x = normal(64).as_strided((1, 1, 1, 16), (2**33, 2**32, 2**31, 1))
    tritonattn.attention(x, x, x, scaling=1.0, backend="triton")


def a_compiled_function() -> None:
    def call(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return tritonattn.attention(q, k, v, backend="triton") * 2

    leaves = [normal(1, 2, 24, 16).requires_grad_() for _ in range(3)]
    torch.compile(call, fullgraph=True, backend="aot_eager")(*leaves).sum().backward()


CASES = {  # tests/emulated launches all other shapes; most of these take the same code
    case.__name__: case
    for case in (
        odd_layouts,
        an_expanded_gradient,
        more_heads_than_an_axis,
        a_longer_batch_than_an_axis,
        nothing,
        a_long_cache,
        strides_past_int32,
        a_compiled_function,
    )
}


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # by torch.compile
@pytest.mark.parametrize("case", CASES)
def test_launches(case, stub, launches):
    refused = len(stub.messages())
    with stub.active(90, launches.append):
        CASES[case]()
    assert stub.messages()[refused:] == []
    assert (launches == []) == (case == "nothing")


def test_devices_of_one_model_load_a_kernel_each(stub, launches):
    q, loads = normal(1, 2, 24, 16), []
    with stub.active(90, launches.append):
        for device in (3, 4, 3):
            before = stub.count("loads")
            with torch.cuda.device(device):
                tritonattn.attention(q, q, q, backend="triton")
            assert stub.index == 3
            loads.append(stub.count("loads") - before)
    assert len(launches) == 3
    assert loads[1:] == [1, 0]


def test_nothing_is_compiled_while_a_graph_is_captured(stub, launches, monkeypatch):
    def call() -> None:
        q = normal(1, 1, 24, 16)
        tritonattn.attention(q, q, q, window=(5, 5), backend="triton")

    with stub.active(90, launches.append):
        monkeypatch.setattr(stub, "is_capturing", True)
        with pytest.raises(RuntimeError, match=r"call tritonattn\.warmup"):
            call()
        assert launches == []
        monkeypatch.setattr(stub, "is_capturing", False)
        call()
        monkeypatch.setattr(stub, "is_capturing", True)
        call()
    assert len(launches) == 2


def test_the_first_launch_of_a_thread(stub, launches, monkeypatch):
    """It has no context yet, and tensor maps are encoded before Triton's launcher makes one."""
    monkeypatch.setattr(launch, "config_for", lambda *call: replace(quick_config(*call), descriptors=True))
    q, refused, maps = normal(1, 1, 24, 16), len(stub.messages()), stub.count("maps")
    with stub.active(90, launches.append):
        tritonattn.attention(q, q, q, backend="triton")  # which compiles
        with ThreadPoolExecutor(1) as fresh:
            launched = fresh.submit(tritonattn.attention, q, q, q, backend="triton")
    assert stub.messages()[refused:] == []
    assert launched.result().shape == q.shape
    assert (stub.count("maps") - maps) / len(launches) == 2  # of keys and values


def test_more_programs_than_triton_counts(stub, launches):
    """65,535 sequences, all but the last empty, 128 heads, and 2,063 blocks of rows: no axis is too long."""
    sequences, heads, longest = 65_535, 128, 33_000
    starts = torch.zeros(sequences + 1, dtype=torch.int32)
    starts[-1] = longest
    q = normal(1, 1, 16).expand(longest, heads, 16)
    with stub.active(90, launches.append):
        tritonattn.attention_varlen(q, q, q, starts, starts, longest, longest, backend="triton")
    programs = [blocks * of_heads * of_sequences for _, (blocks, of_heads, of_sequences), *_ in launches]
    assert max(programs) < 2**31 <= sum(programs)
    (size,) = {one.grid[0] for one in launches}
    assert sum(one.grid[2] for one in launches) == -(-sequences * heads // size), "sections of heads"
