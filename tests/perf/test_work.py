"""Counts of work against a count of the visible pairs, and against the tensors themselves."""

import pytest
import torch

pytest.importorskip("triton")
from perf.work import Shape, flops, forward_flops, visible_pairs
from tritonattn.core.visibility import Visibility


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(("q_len", "k_len"), [(1, 1), (1, 7), (7, 1), (5, 5), (5, 9), (9, 5), (16, 16)])
def test_visible_pairs_and_flops(q_len, k_len, causal):
    q, k = torch.empty(2, 3, q_len, 4), torch.empty(2, 3, k_len, 4)
    dense = Visibility.of(q, k, causal=causal).dense()
    assert visible_pairs(q_len, k_len, causal) == int(dense.sum())
    shape = Shape(2, 3, 3, q_len, k_len, 4, causal)
    products = sum(2 * 2 * 4 for _ in range(2 * 3 * int(dense.sum())))  # two, of 4 multiplications and 4 additions
    assert forward_flops(shape) == products
    assert flops(shape, "backward") == 2.5 * products
    assert flops(shape, "forward+backward") == 3.5 * products
