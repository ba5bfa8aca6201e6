"""The values of the modes that count keys."""

import math

import pytest
import torch

import tritonattn
from tritonattn.core.statistics import Statistics
from tritonattn.core.visibility import Visibility
from tritonattn.scaling import KeyCount, LogKeyCount, SqrtKeyCount


def factors(scaling, rows=5, dim=16):
    """The factor of every row of a causal square."""
    q = k = torch.randn(1, 1, rows, dim)
    visibility = Visibility.of(q, k, causal=True)
    scales = scaling.scales(q, k, visibility, Statistics(k, visibility))
    return (scales.constant * scales.query).flatten().tolist()


def test_values():
    assert factors(KeyCount()) == pytest.approx([1, 1 / 2, 1 / 3, 1 / 4, 1 / 5])
    assert factors(SqrtKeyCount()) == pytest.approx([n**-0.5 for n in range(1, 6)])
    assert factors(LogKeyCount()) == pytest.approx([math.log(n) / 4 for n in range(1, 6)])


def test_the_base_is_where_the_factor_is_that_of_sqrt_dim():
    row = factors(LogKeyCount(base=512.0), rows=512)
    assert row[511] == pytest.approx(1 / 4)
    assert row[0] == 0


@pytest.mark.parametrize("base", [1.0, 0.5, -2, math.inf, math.nan, "e", None, True])
def test_bases_without_a_positive_logarithm_are_refused(base):
    with pytest.raises(ValueError, match=r"base: expected a finite number above 1, got"):
        LogKeyCount(base=base)


@pytest.mark.parametrize("name", ["key_count", "sqrt_key_count", "log_key_count", "qwen_logn", "llama4", "ministral3"])
@pytest.mark.parametrize("keys", [0, 1, 7, 20000])
def test_where_all_rows_see_all_keys_the_factor_is_a_number(name, keys):
    """The number is the factor of a causal mask's last row."""
    scaling = tritonattn.SCALINGS[name]()
    q, k = torch.empty(1, 1, 1, 4), torch.empty(1, 1, keys, 4)
    full, ranges = Visibility.of(q, k), Visibility.of(q, k, key_lengths=torch.tensor([keys]))
    alone = scaling.scales(q, k, full, Statistics(k, full))
    assert alone.query is None
    of_rows = scaling.scales(q, k, ranges, Statistics(k, ranges))
    assert alone.constant == pytest.approx((of_rows.constant * of_rows.query).item(), rel=1e-12)
