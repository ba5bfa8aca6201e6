"""Bytes that ranks send and hold: those of the formulas, for few ranks and for 1,024."""

import pytest

from perf.distributed import (
    LAYOUTS,
    METHODS,
    Sizes,
    on_a_rank,
    peak_by_formula,
    peak_of_a_rank,
    sent_by_formula,
)
from tests.support.pairs import in_turn

SIZES = Sizes(length=512, q_heads=8, kv_heads=4, head_dim=128, itemsize=2)


@in_turn(method=[*METHODS, "ring"], layout=LAYOUTS)
def test_bytes_are_those_of_the_formula(method, layout, pool):
    for rank in pool.run(on_a_rank, 4, method, layout, SIZES, 1):
        assert rank.sent == sent_by_formula(method, 4, SIZES)
        assert 0 < rank.statistics <= 0.005 * rank.sent


@pytest.mark.parametrize("form", ["allgather", "ring"])
def test_peaks_of_memory_are_near_the_formula(form, pool):
    sizes = Sizes(length=1024, q_heads=16, kv_heads=8, head_dim=128, itemsize=2)
    measured = max(pool.run(peak_of_a_rank, 4, form, sizes))
    assert 0.8 <= measured / peak_by_formula(form, 4, sizes) <= 1.7  # with what the operator works in
