"""The pieces of work that a call on a GPU hands to it: kernels of ours, and torch's, each a launch.

The kernels are not run, and the tensors are a CPU's: what a GPU is not asked for, reading values, is left out.
"""

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

import tritonattn
from tests.support.device_work import values_unread, work_of_torch

pytest.importorskip("triton")
from tritonattn.backends.triton import launch

S = 64


@pytest.fixture
def kernels(monkeypatch) -> Iterator[list[str]]:
    """The kernels launched, which do nothing."""
    launched: list[str] = []

    def run(kernel, grid, arguments, config) -> None:
        launched.append(kernel.__name__)
        if "argmax_ptr" in arguments:  # positions of keys to torch; by numpy, which its profiler does not record
            arguments["argmax_ptr"].numpy()[:] = 0

    monkeypatch.setattr(launch, "run", run)
    monkeypatch.setattr(launch, "config_for", lambda *call: tritonattn.tuning.default_config(*call))
    with values_unread():
        yield launched


def operands(requires_grad: bool = False) -> list[Tensor]:
    return [torch.randn(1, 4, S, 64, dtype=torch.bfloat16, requires_grad=requires_grad) for _ in range(3)]


LENGTHS = {"key_lengths": torch.tensor([50], dtype=torch.int32)}
RANGES = {
    "key_ranges": torch.stack([torch.arange(1, S + 1)[None].clamp(max=3), torch.arange(1, S + 1)[None]], -1).int()
}


@pytest.mark.parametrize(
    ("scaling", "masks", "forward", "with_backward"),  # launches of kernels of ours, and of torch's
    [
        ("sqrt_dim", {"causal": True}, (1, 0), (4, 0)),
        ("key_count", {}, (1, 1), None),  # of one number, on the host
        ("key_count", {"causal": True}, (1, 1), (4, 1)),
        ("log_key_count:64", {"causal": True, "window": (16, 0)}, (1, 1), None),
        ("key_norm_sum", {}, (2, 5), None),
        ("key_norm_sum", {"causal": True}, (3, 3), (8, 11)),  # k goes on in fp32: 3 casts
        ("key_norm_mean", {"causal": True}, (3, 6), None),
        ("key_norm_rms", {"causal": True}, (3, 6), None),
        ("key_norm_max", {}, (2, 4), None),  # argmax, gather, threshold, reciprocal
        ("key_norm_max", {"causal": True}, (3, 7), None),
        ("key_norm_max", {"causal": True, "window": (16, 0)}, (3, 9), (8, 27)),
        ("cosine", {"causal": True}, (3, 4), (8, 16)),
        ("sqrt_dim", LENGTHS, (1, 1), None),
        ("key_count", LENGTHS, (1, 10), None),
        ("key_norm_sum", LENGTHS, (4, 12), None),
        ("sqrt_dim", RANGES, (2, 5), (7, 7)),  # 3 to compare lo and hi on a CPU
        ("key_norm_sum", RANGES, (5, 30), None),  # 3 to compare, 11 to begin sums again at documents
    ],
)
def test_attention(scaling, masks, forward, with_backward, kernels):
    def call(q, k, v) -> None:
        out = tritonattn.attention(q, k, v, scaling=scaling, backend="triton", **masks)
        if q.requires_grad:
            torch.autograd.grad(out, (q, k, v), q.detach())

    for differentiates, wanted in enumerate((forward, with_backward)):
        if wanted is not None:
            tensors, (of_ours, of_torch) = operands(bool(differentiates)), wanted
            kernels.clear()
            found = work_of_torch(lambda tensors=tensors: call(*tensors))
            assert len(found) <= of_torch, found
            assert len(kernels) == 2 * of_ours


@pytest.mark.parametrize(
    ("scaling", "recorded", "of_ours", "of_torch"),
    [
        ("sqrt_dim", False, 2, 0),
        ("key_count", False, 2, 5),
        ("key_norm_sum", True, 2, 10),
        ("key_norm_max", True, 2, 9),
    ],
)
def test_decode(scaling, recorded, of_ours, of_torch, kernels):
    q = torch.randn(1, 4, 1, 64, dtype=torch.bfloat16)
    k, v = torch.randn(2, 1, 4, 4096, 64, dtype=torch.bfloat16)
    statistics = tritonattn.KeyStatistics(batch=1, kv_heads=4, capacity=4096) if recorded else None

    def call() -> None:
        tritonattn.attention_decode(
            q, k, v, key_lengths=torch.tensor([4000]), scaling=scaling, statistics=statistics, backend="triton"
        )

    found = work_of_torch(call)
    assert len(found) <= of_torch, found
    assert len(kernels) == 2 * of_ours


@pytest.mark.parametrize(("scaling", "of_torch"), [("sqrt_dim", 0), ("key_count", 6)])
def test_decode_over_pages(scaling, of_torch, kernels):
    q, pages = torch.randn(2, 4, 1, 64, dtype=torch.bfloat16), torch.randn(8, 16, 4, 64, dtype=torch.bfloat16)
    lengths, table = torch.tensor([40, 64], dtype=torch.int32), torch.arange(8, dtype=torch.int32).view(2, 4)
    options = {"key_lengths": lengths, "block_table": table, "scaling": scaling, "backend": "triton"}
    found = work_of_torch(lambda: tritonattn.attention_decode(q, pages, pages, **options))
    assert len(found) <= of_torch, found
    assert len(kernels) == 2
