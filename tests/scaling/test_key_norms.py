"""The values of the key norm modes, and which key takes the maximum's gradient."""

import math

import pytest
import torch

from tritonattn.core.statistics import SMALLEST_STATISTIC, Statistics, reciprocal, reciprocal_root
from tritonattn.core.visibility import Visibility
from tritonattn.scaling import SCALINGS, KeyNormMax

STATISTICS = {  # of the keys so far
    "key_norm_sum": [5, 7, 17],
    "key_norm_mean": [5, 3.5, 17 / 3],
    "key_norm_rms": [5, math.sqrt(29 / 2), math.sqrt(129 / 3)],
    "key_norm_max": [5, 5, 10],
    "key_norm_l2": [5, math.sqrt(29), math.sqrt(129)],
}
KEYS = torch.tensor([[3.0, 4.0], [0.0, 2.0], [-6.0, 8.0]], dtype=torch.float64)[None, None]  # norms 5, 2, 10


def query_scale(scaling, k, **arguments):
    visibility = Visibility.of(k, k, **arguments)
    scales = scaling.scales(k, k, visibility, Statistics(k, visibility))
    assert scales.constant == 1.0
    assert scales.key is None
    return scales.query[0, 0]


@pytest.mark.parametrize("mode", STATISTICS)
def test_values(mode):
    row = query_scale(SCALINGS[mode](), KEYS, causal=True)
    assert row.tolist() == pytest.approx([1 / statistic for statistic in STATISTICS[mode]], rel=1e-14)


def test_the_lowest_of_equal_keys_takes_the_gradient():
    k = torch.ones(1, 1, 4, 2, dtype=torch.float64, requires_grad=True)
    visible = torch.tensor([False, True, True, True]).expand(1, 1, 4, 4)
    ours = query_scale(KeyNormMax(), k, mask=visible).sum()
    ranged = query_scale(KeyNormMax(), k, key_ranges=torch.tensor([[[1, 4]] * 4])).sum()
    dense = KeyNormMax().multiplier(k, k, visible).sum()
    for factor in (ours, ranged, dense):
        (gradient,) = torch.autograd.grad(factor, k)
        assert gradient[0, 0].any(-1).tolist() == [False, True, False, False]


def test_statistics_below_the_normal_range_count_as_zero():
    k = torch.full((1, 1, 3, 2), 1e-40, requires_grad=True)
    for mode in STATISTICS:
        row = query_scale(SCALINGS[mode](), k)
        assert (row == 0).all()
        assert (torch.autograd.grad(row.sum(), k)[0] == 0).all()


def test_a_nan_that_a_row_sees_is_not_hidden():
    k = KEYS.clone()
    k[0, 0, 1, 0] = torch.nan
    for mode in STATISTICS:
        assert query_scale(SCALINGS[mode](), k, causal=True).isnan().tolist() == [False, True, True]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_smallest_statistic_that_counts(dtype):
    """In fp32, where it is a node of its own, as in fp64; a root counts where its square is the smallest's."""
    limit = torch.tensor(SMALLEST_STATISTIC, dtype=dtype)
    below = limit.nextafter(torch.zeros_like(limit))
    s = torch.stack([limit, below, torch.zeros_like(limit), limit * 0 + torch.nan]).requires_grad_()
    factor = reciprocal(s)
    assert factor[:3].tolist() == [2.0**126, 0, 0]
    assert factor[3].isnan()
    assert torch.autograd.grad(factor[:3].sum() * 2.0**-130, s)[0][:3].tolist() == [-(2.0**122), 0, 0]
    square = s.detach().double().square()
    assert reciprocal_root(square)[:3].tolist() == [2.0**126, 0, 0]
