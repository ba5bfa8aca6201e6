"""Bytes that ranks send and hold: those of the formulas, for few ranks and for 1,024."""

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh

from perf.distributed import (
    LAYOUTS,
    METHODS,
    Sizes,
    counted,
    modelled_rows,
    on_a_rank,
    peak_by_formula,
    peak_of_a_rank,
    sent_by_formula,
)
from perf.distributed import Assumptions as Assumed
from tests.support.pairs import in_turn
from tritonattn.distributed import context_parallel_attention

SIZES = Sizes(length=512, q_heads=8, kv_heads=4, head_dim=128, itemsize=2)


@in_turn(method=[*METHODS, "ring"], layout=LAYOUTS)
def test_bytes_are_those_of_the_formula(method, layout, pool):
    for rank in pool.run(on_a_rank, 4, method, layout, SIZES, 1):
        assert rank.sent == sent_by_formula(method, 4, SIZES)
        assert 0 < rank.statistics <= 0.005 * rank.sent


@pytest.mark.parametrize("method", METHODS)
def test_a_rank_of_1024(method):
    """Shapes and bytes; torch's fake processes send nothing."""
    from torch.testing._internal.distributed.fake_pg import FakeStore

    sizes = Sizes(length=2048, q_heads=1024 if method == "alltoall" else 2, kv_heads=2, head_dim=4, itemsize=4)
    dist.init_process_group("fake", store=FakeStore(), rank=700, world_size=1024)
    try:
        mesh = init_device_mesh("cpu", (1024,))
        parts = [torch.randn(1, heads, 2, 4, requires_grad=True) for heads in (sizes.q_heads, 2, 2)]
        with counted() as sent:
            out = context_parallel_attention(*parts, mesh=mesh, method=method, causal=True)
            out.sum().backward()
    finally:
        dist.destroy_process_group()
    assert out.shape == parts[0].shape
    assert [x.grad.shape for x in parts] == [x.shape for x in parts]
    assert sum(sent) == pytest.approx(sent_by_formula(method, 1024, sizes), rel=0.01)


@pytest.mark.parametrize("form", ["allgather", "ring"])
def test_peaks_of_memory_are_near_the_formula(form, pool):
    sizes = Sizes(length=1024, q_heads=16, kv_heads=8, head_dim=128, itemsize=2)
    measured = max(pool.run(peak_of_a_rank, 4, form, sizes))
    assert 0.8 <= measured / peak_by_formula(form, 4, sizes) <= 1.7  # with what the operator works in


def test_the_model_of_more_ranks():
    rows = {(ranks, tokens): row for ranks, tokens, *row in modelled_rows((65536, 8388608), Assumed())}
    compute, *rest = rows[8, "65,536"]
    assert (compute, rest[:3]) == ("38.5", ["0.49", "0.17", "0.52"])
    assert rest[3:] == ["2.55", "0.80", "0.73", "0.94", "allgather"]  # of keys and values of all ranks: 0.25 in bf16
    assert rows[1024, "8,388,608"][-1] == "ring"
