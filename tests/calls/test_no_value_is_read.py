"""Calls on tensors of a GPU never wait for it: FakeTensors say that they are there, and have no values to read.

Reading a value raises. Kernels are recorded, not run, and all their tensors must be on the GPU.
"""

import ctypes
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensor, FakeTensorMode

import tritonattn
from tests.support.calls import TYPICAL
from tests.support.pairs import pairwise
from tritonattn import ops
from tritonattn.backends.triton import backward, launch
from tritonattn.core.call import AttentionCall, RowGradients
from tritonattn.core.terms import Needs
from tritonattn.tuning.config import Target
from tritonattn.tuning.defaults import default_config

B, H, KV, S, D = 2, 4, 2, 96, 64
CUDA = torch.device("cuda", 0)


@pytest.fixture(scope="module")
def _guard(tmp_path_factory) -> None:
    """A device guard for cuda, which torch's builds for CUDA have."""
    if torch.version.cuda:
        return
    source, made = Path(__file__).with_name("cuda_guard.cpp"), tmp_path_factory.mktemp("guard") / "guard.so"
    folder = Path(torch.__file__).parent
    options = ["-std=c++20", "-shared", "-fPIC", f"-I{folder / 'include'}", f"-L{folder / 'lib'}"]
    subprocess.run(["g++", *options, str(source), "-o", str(made), "-lc10"], check=True)
    ctypes.CDLL(str(made))


@pytest.fixture(autouse=True)
def kernels(monkeypatch, _guard):
    """The names of the kernels launched. The package takes FakeTensors for real ones, as it does those of a GPU."""
    launched: list[str] = []

    def run(kernel, grid, arguments, config) -> None:
        assert {tensor.device for tensor in launch.tensors_of(arguments.values())} == {CUDA}, kernel.__name__
        launched.append(kernel.__name__)

    monkeypatch.setattr(launch, "run", run)
    monkeypatch.setattr(launch, "config_for", lambda *of: default_config(*of))
    monkeypatch.setattr(Target, "of", lambda device: Target("cuda", "90"))
    monkeypatch.setattr(FakeTensor, "data_ptr", lambda self: 1 << 30)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    stream = object()  # of this test alone, so that it meets no counts that another has kept
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: stream)
    for module in [module for name, module in sys.modules.items() if name.startswith("tritonattn.")]:
        if hasattr(module, "runs_eagerly"):
            monkeypatch.setattr(module, "runs_eagerly", lambda *tensors: not torch.compiler.is_compiling())
    with FakeTensorMode(allow_non_fake_inputs=True):
        yield launched


@pytest.fixture
def calls(monkeypatch) -> list[AttentionCall]:
    """The calls that reached the operators."""
    reached, attention = [], ops.attention

    def keep(call):
        reached.append(call)
        return attention(call)

    monkeypatch.setattr(ops, "attention", keep)
    return reached


def tensor(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.empty(shape, dtype=dtype, device=CUDA)


def integers(*shape: int) -> Tensor:
    return tensor(*shape, dtype=torch.int32)


@contextmanager
def reading_fails() -> Iterator[None]:
    try:
        yield
    except DataDependentOutputException as error:
        pytest.fail(f"expected no value to be read, got {error}")


def masks(name: str) -> dict[str, Any]:
    found: dict[str, dict[str, Any]] = {
        "full": {},
        "causal": {"causal": True},
        "window": {"causal": True, "window": (16, 0)},
        "lengths": {"key_lengths": integers(B)},
        "ranges": {"key_ranges": integers(B, S, 2)},
        "mask": {"mask": tensor(B, 1, S, S, dtype=torch.bool)},
    }
    return found[name]


def take_back(call: AttentionCall) -> None:
    """The backward pass of a call; torch's engine would look for the device."""
    logits, (batch, heads, rows, _) = call.terms, call.q.shape
    present = (logits.query_scale, logits.key_scale, logits.key_bias, logits.sinks)
    out, lse = tensor(batch, heads, rows, call.v.shape[3]), tensor(batch, heads, rows, dtype=torch.float32)
    needs = Needs(True, True, True, *(x is not None for x in present))
    backward(call, out, lse, torch.empty_like(out), RowGradients(), needs, torch.empty_like(out))


@pairwise(scaling=TYPICAL, mask=["full", "causal", "window", "lengths", "ranges", "mask"], form=["plain", "everything"])
def test_attention(scaling, mask, form, calls, kernels):
    options = masks(mask)
    if form == "everything":
        options["key_bias"] = tensor(B, KV, S)
        options |= {"softcap": 2.0, "dropout_p": 0.1, "sinks": tensor(H, dtype=torch.float32), "return_aux": True}
    with reading_fails():
        tritonattn.attention(tensor(B, H, S, D), tensor(B, KV, S, D), tensor(B, KV, S, D), scaling=scaling, **options)
        take_back(calls[0])
    assert {"attention_forward", "attention_grad_query", "attention_grad_key_value"} <= set(kernels)


@pytest.mark.parametrize("scaling", sorted(tritonattn.SCALINGS))
def test_packed_sequences(scaling, calls, kernels):
    starts = integers(4)
    q, k, v = (tensor(S, heads, D) for heads in (H, KV, KV))
    with reading_fails():
        tritonattn.attention_varlen(q, k, v, starts, starts, 50, 50, causal=True, scaling=scaling, dropout_p=0.1)
        take_back(calls[0])
    assert "attention_grad_key_value" in kernels


@pytest.mark.parametrize("scaling", ["sqrt_dim", *TYPICAL])
def test_decoding(scaling, kernels):
    q, lengths = tensor(B, H, 1, D), integers(B)
    k, v = tensor(B, KV, 4096, D), tensor(B, KV, 4096, D)
    with reading_fails():
        tritonattn.attention_decode(q, k, v, key_lengths=lengths, scaling=scaling)
        statistics = tritonattn.KeyStatistics(B, KV, 4096, device=CUDA)
        statistics.append(tensor(B, KV, 300, D))
        statistics.append(tensor(B, KV, 3, D), lengths)
        statistics.truncate(lengths)
        statistics.reorder(lengths)
        options = {"window": (100, 0), "return_aux": True}
        tritonattn.attention_decode(q, k, v, key_lengths=lengths, scaling=scaling, statistics=statistics, **options)
        pages = tensor(50, 16, KV, D)
        table = integers(B, 20)
        tritonattn.attention_decode(q, pages, pages, key_lengths=lengths, block_table=table, scaling=scaling)
    assert kernels.count("attention_decode") == 3
    assert {"append_keys_kernel", "combine_splits"} <= set(kernels)


@pytest.mark.parametrize("scaling", TYPICAL)
def test_ragged_rows_over_pages(scaling, kernels):
    q, starts, lengths, table = tensor(S, H, D), integers(B + 1), integers(B), integers(B, 20)
    k, v = tensor(50, KV, 16, 2 * D).transpose(1, 2).split(D, -1)
    statistics = tritonattn.PagedKeyStatistics(50, 16, KV, device=CUDA)
    with reading_fails(), torch.no_grad():
        statistics.append(tensor(S, KV, D), starts, key_lengths=lengths, block_table=table)
        for options in ({}, {"statistics": statistics}, {"statistics": statistics, "window": (100, 0)}):
            options |= {"block_table": table, "scaling": scaling}
            tritonattn.attention_varlen(q, k, v, starts, starts, 50, 300, causal=True, **options)
            options |= {"key_lengths": lengths, "query_lengths": lengths}
            tritonattn.attention_decode(tensor(B, H, 3, D), k, v, **options)
    assert {"attention_forward", "attention_decode", "append_to_pages_kernel"} <= set(kernels)


def test_a_value_that_is_read_fails():
    with pytest.raises(pytest.fail.Exception, match="no value to be read"), reading_fails():
        integers(2).sum().item()
