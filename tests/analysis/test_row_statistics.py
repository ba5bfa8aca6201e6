"""The statistics of every row against their definitions, dense and in float64, and the Jacobian against autograd's."""

import math

import pytest
import torch

from tests.support.learned import LEARNED
from tests.support.masks import MASKS
from tests.support.rows import HQ, B, dense, tensors
from tests.support.watch import Watch
from tritonattn import SCALINGS
from tritonattn.analysis.row_statistics import row_statistics
from tritonattn.calls.checks import check
from tritonattn.core.call import Request
from tritonattn.core.terms import Terms
from tritonattn.core.visibility import Visibility


def streamed(q, k, scaling="sqrt_dim", gain=None, **masks):
    visible = Visibility.of(q, k, **masks)
    return row_statistics(check(Request(q, k, k, visible, Terms(), scaling, gain)))


def assert_same(ours, exact, rows=slice(None)):
    for name, value in exact.items():
        found = getattr(ours, name)[:, :, rows]
        torch.testing.assert_close(found, value, rtol=1e-6, atol=1e-12, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("name", [*SCALINGS, *LEARNED])
def test_every_mode(name):
    q, k = tensors(kv_heads=1)
    scaling = LEARNED[name]() if name in LEARNED else name
    masks = MASKS["causal lengths"](B, HQ, 6, 9)
    assert_same(streamed(q, k, scaling, **masks), dense(q, k, scaling, **masks))


@pytest.mark.parametrize("lengths", [(1, 700), (300, 600), (3, 0), (0, 3), (4, 1)])
def test_more_keys_and_rows_than_a_block_holds_and_none(lengths):
    q, k = tensors(*lengths)
    rows = slice(None) if lengths[0] < 10 else slice(255, 257)
    ours = streamed(q, k, "key_norm_mean", causal=True)
    if 0 in lengths:
        assert all(getattr(ours, name).eq(0).all() for name in vars(ours))
        assert ours.key_count.shape == (B, HQ, lengths[0])
        return
    ranges = torch.stack(Visibility.of(q, k, causal=True).ranges(), -1)[:, rows].expand(B, -1, -1)
    assert_same(ours, dense(q[:, :, rows], k, "key_norm_mean", key_ranges=ranges), rows)


@pytest.mark.parametrize("gap", [5.0, 50.0, 300.0])
def test_small_remainders_of_one_hot_rows_keep_their_digits(gap):
    """Two keys whose logits are `gap` apart: p = (1 - e, e), so a sum of powers of p would be all rounding."""
    q, k = torch.ones(1, 1, 1, 1, dtype=torch.float64), torch.tensor([0.0, gap]).double().view(1, 1, 2, 1)
    rest = math.exp(-gap) / (1 + math.exp(-gap))
    for order in (slice(None), torch.tensor([1, 0])):
        ours = streamed(q, k[:, :, order], 1.0)
        torch.testing.assert_close(ours.jacobian_norm.item(), 2 * rest * (1 - rest), rtol=1e-12, atol=0)
        entropy = -rest * math.log(rest) - (1 - rest) * math.log1p(-rest)
        torch.testing.assert_close(ours.entropy.item(), entropy, rtol=1e-12, atol=0)


def test_memory_is_that_of_blocks():
    q, k = torch.randn(1, 1, 300, 8), torch.randn(1, 1, 1 << 15, 8)
    ranges = torch.tensor([[0, 300]] * 299 + [[0, 1 << 15]])[None]
    with Watch() as watch:
        ours = streamed(q, k, "key_norm_sum", key_ranges=ranges)
    assert watch.largest <= 8 << 20  # [Sq, Sk] of bytes alone would be 9 MiB
    assert ours.key_count.amax() == 1 << 15


def test_a_row_of_blocks_is_joined_in_any_order():
    q, k = tensors(2, 900, size=3.0)
    one = streamed(q, k, "cosine", 4.0)
    two = streamed(q, k.flip(2), "cosine", 4.0)
    for name in vars(one):
        torch.testing.assert_close(getattr(one, name), getattr(two, name), rtol=1e-9, atol=1e-15)
