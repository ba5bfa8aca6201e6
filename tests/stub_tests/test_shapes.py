"""Launches of unusual shapes and layouts: the driver takes each, with the parameters of the call. No kernel runs."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")
import tritonattn
from tests.support.packed import offsets
from tests.support.pairs import in_turn
from tests.support.tiles import quick_config
from tritonattn.backends.triton import append_keys, append_to_pages, launch

BFLOAT, HALF, SINGLE = torch.bfloat16, torch.float16, torch.float32


@pytest.fixture
def launches(stub, monkeypatch) -> list:
    """Launches of small tiles, which compile quickly, so far."""
    monkeypatch.setattr(launch, "config_for", quick_config)
    return []


def normal(*shape: int, dtype: torch.dtype = BFLOAT) -> Tensor:
    return torch.randn(shape, dtype=dtype)


def alike(*shape: int, dtype: torch.dtype = BFLOAT) -> tuple[Tensor, Tensor, Tensor]:
    q, k, v = (normal(*shape, dtype=dtype) for _ in range(3))
    return q, k, v


def train(q: Tensor, k: Tensor, v: Tensor, **options: Any) -> None:
    """A call and its backward pass."""
    leaves = [x.detach().requires_grad_() for x in (q, k, v)]
    result = tritonattn.attention(*leaves, backend="triton", **options)
    out = result[0] if isinstance(result, tuple) else result
    torch.autograd.grad(out, leaves, torch.ones_like(out))


def every_form() -> None:
    q, (k, v) = normal(1, 4, 70, 64), normal(2, 1, 2, 90, 64)
    options = {"softcap": 2.0, "sinks": torch.zeros(4), "dropout_p": 0.2, "return_aux": True}
    train(q, k, v, causal=True, scaling="key_norm_sum", **options)


def ranges_and_mask() -> None:
    ranges = torch.tensor([[[0, 40]] * 40], dtype=torch.int32)
    mask = torch.ones(40, 40, dtype=torch.bool)
    train(*alike(1, 2, 40, 64, dtype=HALF), scaling="cosine", mask=mask, key_ranges=ranges)


def head_dim_of_one() -> None:
    train(*alike(1, 2, 20, 1))


def odd_head_dims() -> None:
    train(*alike(1, 2, 40, 17)[:2], normal(1, 2, 40, 23), causal=True)


def packed_projections() -> None:
    q, k, v = normal(2, 50, 3, 4, 64).transpose(1, 3).unbind(2)
    train(q, k, v, causal=True)


def an_address_off_by_one() -> None:
    x = normal(2 * 2 * 24 * 64 + 1)[1:].view(2, 2, 24, 64)
    train(x, x, x, causal=True)


def rows_across_memory() -> None:
    x = normal(1, 2, 64, 40).transpose(2, 3)
    train(x, x, x)


def an_expanded_gradient() -> None:
    q = normal(1, 2, 24, 64).requires_grad_()
    tritonattn.attention(q, q, q, backend="triton").sum().backward()


def more_heads_than_an_axis() -> None:
    train(*alike(1, 70_000, 1, 16))


def a_longer_batch_than_an_axis() -> None:
    tritonattn.attention(*alike(70_000, 1, 2, 16), scaling="key_count", causal=True, backend="triton")


def nothing() -> None:
    for shape in ((0, 2, 8, 16), (1, 2, 0, 16), (1, 0, 8, 16)):
        train(*alike(*shape), scaling="key_norm_sum", causal=True)
    for rows, keys in ((8, 0), (0, 8)):
        train(normal(1, 2, rows, 16), normal(1, 2, keys, 16), normal(1, 2, keys, 16))


def sequences_of_nothing() -> None:
    starts = torch.tensor([0, 30, 30, 100], dtype=torch.int32)
    leaves = [normal(100, 4, 64).requires_grad_() for _ in range(3)]
    out = tritonattn.attention_varlen(*leaves, starts, starts, 70, 70, scaling="key_norm_sum", backend="triton")
    torch.autograd.grad(out, leaves, torch.ones_like(out))


def a_cache_of_pages() -> None:
    table = torch.zeros(2, 64, dtype=torch.int32)
    pages = normal(40, 16, 2, 64)
    lengths = torch.tensor([900, 20])
    tritonattn.attention_decode(
        normal(2, 8, 3, 64), pages, pages, key_lengths=lengths, block_table=table, backend="triton", return_aux=True
    )


def ragged_rows_over_pages() -> None:
    for lengths, page, count in (((1, 0, 30), 16, 40), ((5, 17, 2), 17, 33)):
        ends = offsets(lengths)
        k, v = normal(count, page, 3, 128).split(64, -1)
        after, table = torch.tensor([33, 20, 30]), torch.zeros(3, 3, dtype=torch.int32)
        statistics = tritonattn.PagedKeyStatistics(count, page, 3)
        new = normal(int(ends[-1]), 3, 64)
        append_to_pages(new, ends, after, table, page, statistics._buffers())
        q, keys = normal(len(new), 6, 64), offsets(tuple(after.tolist()))
        options = {"causal": True, "block_table": table, "backend": "triton"}
        tritonattn.attention_varlen(q, k, v, ends, keys, max(lengths), 33, **options)


def a_long_cache() -> None:
    keys = normal(1, 1, 1, 16).expand(1, 1, 2**20, 16)
    tritonattn.attention_decode(normal(1, 1, 1, 16), keys, keys, key_lengths=torch.tensor([2**20]), backend="triton")


def strides_past_int32() -> None:
    x = normal(64).as_strided((1, 1, 1, 16), (2**33, 2**32, 2**31, 1))
    tritonattn.attention(x, x, x, scaling=1.0, backend="triton")


def a_compiled_function() -> None:
    def call(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return tritonattn.attention(q, k, v, causal=True, scaling="key_count", backend="triton") * 2

    leaves = [normal(1, 2, 24, 64).requires_grad_() for _ in range(3)]
    torch.compile(call, fullgraph=True, backend="aot_eager")(*leaves).sum().backward()


def new_keys_of_a_cache() -> None:
    statistics = tritonattn.KeyStatistics(2, 2, 200)
    for count in (100, 1):  # by two kernels, and by one
        append_keys(normal(2, 2, count, 64), None, statistics._buffers())


CASES = {  # neighbours but one take the same card, and those that are alike the same code
    case.__name__: case
    for case in (
        every_form,
        ranges_and_mask,
        head_dim_of_one,
        odd_head_dims,
        packed_projections,
        rows_across_memory,
        an_address_off_by_one,
        an_expanded_gradient,
        more_heads_than_an_axis,
        a_longer_batch_than_an_axis,
        nothing,
        sequences_of_nothing,
        a_cache_of_pages,
        a_long_cache,
        ragged_rows_over_pages,
        new_keys_of_a_cache,
        strides_past_int32,
        a_compiled_function,
    )
}


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # by torch.compile
@in_turn(case=CASES, capability=[80, 90])
def test_launches(case, capability, stub, launches):
    refused = len(stub.messages())
    with stub.active(capability, launches.append):
        CASES[case]()
    assert stub.messages()[refused:] == []
    assert (launches == []) == (case == "nothing")


def test_devices_of_one_kind_load_a_kernel_each(stub, launches):
    q, loads = normal(1, 1, 24, 16), []
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
        tritonattn.attention(q, q, q, softcap=3.25, window=(5, 5), backend="triton")

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


def test_more_programs_than_triton_counts(stub, launches):
    """65,535 sequences, all but the last empty, 128 heads, and 2,063 blocks of rows: no axis is too long."""
    sequences, heads, longest = 65_535, 128, 33_000
    starts = torch.zeros(sequences + 1, dtype=torch.int32)
    starts[-1] = longest
    q = normal(1, 1, 16).expand(longest, heads, 16)
    with stub.active(90, launches.append):
        tritonattn.attention_varlen(q, q, q, starts, starts, longest, longest, backend="triton")
    programs = [blocks * of_heads * members for _, (blocks, of_heads, members), *_ in launches]
    assert max(programs) < 2**31 <= sum(programs)
    assert sum(one.grid[2] for one in launches) == sequences
