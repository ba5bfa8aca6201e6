"""Key statistics against their dense definition, at the ends of the number range, under transforms."""

import pytest
import torch

from tests.support.calls import torch_kernels
from tests.support.masks import MASKS, visible_pairs
from tests.support.packed import offsets
from tritonattn import document_ranges
from tritonattn.core import ranges
from tritonattn.core.norms import key_norms_of
from tritonattn.core.ranges import prefix_sum
from tritonattn.core.sequences import Sequences
from tritonattn.core.statistics import Statistics
from tritonattn.core.visibility import Visibility
from tritonattn.ops import KernelStatistics
from tritonattn.ops import statistics as by_kernels

B, HQ, HKV, SQ, SK, D = 2, 4, 2, 6, 9, 5
STATISTICS = ["norm_sum", "norm_square_sum", "norm_max"]


def keys(dtype=torch.float64, seed=0):
    return torch.randn(B, HKV, SK, D, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def statistics_of(k, q_len=SQ, **arguments):
    return Statistics(k, Visibility.of(torch.empty(k.shape[0], HQ, q_len, D), k, **arguments))


def dense(k, visible):
    """The three statistics by definition, [B, Hq, Sq] fp64."""
    norms = k.double().square().sum(-1).sqrt().repeat_interleave(HQ // HKV, 1)
    shown = torch.where(visible, norms[:, :, None], 0)
    return dict(zip(STATISTICS, (shown.sum(-1), shown.square().sum(-1), shown.amax(-1)), strict=True))


@pytest.mark.parametrize("name", MASKS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_statistics_are_the_definition(name, dtype):
    arguments = MASKS[name](B, HQ, SQ, SK)
    k = keys(dtype)
    ours = statistics_of(k, **arguments)
    tolerance = 1e-13 if dtype == torch.float64 else 3e-7
    result = torch.float64 if dtype == torch.float64 else torch.float32
    for statistic, expected in dense(k, visible_pairs((B, HQ, SQ, SK), **arguments)).items():
        value = getattr(ours, statistic)
        assert value.dtype == (torch.float64 if statistic == "norm_square_sum" else result)
        value = value.double().repeat_interleave(HQ // value.shape[1], 1)
        torch.testing.assert_close(value, expected, rtol=tolerance, atol=tolerance)


ENDS = [(torch.float32, 1e30), (torch.float32, 1e-30), (torch.bfloat16, 1e30)]


@pytest.mark.parametrize(("dtype", "component"), [*ENDS, (torch.float16, 6e4), (torch.float64, 1e300)])
def test_norms_at_the_ends_of_the_range(dtype, component):
    k = torch.full((3, 4), component, dtype=dtype, requires_grad=True)
    norms = key_norms_of(k)
    torch.testing.assert_close(norms.double(), 2 * k[:, 0].double(), rtol=1e-6, atol=0)
    norms.sum().backward()
    torch.testing.assert_close(k.grad, torch.full_like(k, 0.5))


@pytest.mark.parametrize("component", [1e-30, 1e30])
def test_a_norm_beyond_the_range_of_squares_among_others(component):
    k = torch.ones(5, 4)
    k[2] = component
    torch.testing.assert_close(key_norms_of(k), 2 * k[:, 0], rtol=1e-6, atol=0)


def test_infinite_slopes_of_rows_without_keys_reach_no_key():
    """Of causal rows before the first key, of rows behind a packed sequence's keys, and of empty ranges."""
    k = keys()[:1].requires_grad_()
    packed = {"sequences": Sequences.of(offsets((3, 2)), offsets((0, SK)), SQ, SK, 3, SK)}
    empty = torch.tensor([[[0, 4], [5, 5], [2, SK], [SK, SK], [0, 0], [3, 4]]])
    for q_len, masks in ((SK + 3, {"causal": True}), (SQ, packed), (SQ, {"key_ranges": empty})):
        statistics = statistics_of(k, q_len, **masks)
        attends = statistics.visibility.attending_rows().expand(1, HKV, -1)
        assert not attends.all()
        for name in ("norm_sum", "norm_max"):
            sums = getattr(statistics, name)
            slopes = (torch.where(attends, 1.0, x).to(k.dtype) for x in (0.0, torch.inf))
            gradients = [torch.autograd.grad(sums, k, slope, retain_graph=True)[0] for slope in slopes]
            assert gradients[0].any()
            assert torch.equal(*gradients)


@pytest.mark.parametrize("masks", [{"causal": True}, {"window": (SK, 0)}], ids=str)
def test_nan_is_the_largest_norm(masks):
    k = keys()
    k[:, :, 4] = torch.nan
    largest = statistics_of(k, SK, **masks).norm_max
    assert torch.equal(largest.isnan(), (torch.arange(SK) >= 4).expand_as(largest))


@pytest.mark.parametrize("value", [1.0, torch.nan])
def test_sums_under_a_mask_are_of_visible_keys_alone(value):
    """And so are gradients, where a slope is that value."""
    mask = torch.rand(SQ, SK, generator=torch.Generator().manual_seed(0)) > 0.4
    for holes in (mask[None, None], mask.expand(1, HQ, -1, -1)):
        k = keys()
        k[:, :, 4] = value
        k.requires_grad_()
        total = statistics_of(k, mask=holes).norm_sum
        norms = k.detach().norm(dim=-1)
        expected = torch.where(mask, norms[:, :, None], 0).sum(-1)
        expected = expected if holes.shape[1] == 1 else expected.repeat_interleave(HQ // HKV, 1)
        torch.testing.assert_close(total, expected.expand_as(total), equal_nan=True)
        slope = torch.ones_like(total)
        slope[:, :, 1] = value
        (found,) = torch.autograd.grad(total, k, slope)
        untouched = ~mask[1] & (torch.arange(SK) != 4)
        assert found[:, :, untouched].isfinite().all()


def test_squares_of_huge_keys_fit():
    k = torch.full((B, HKV, SK, D), 1e30, requires_grad=True)
    total = statistics_of(k).norm_square_sum
    torch.testing.assert_close(total, torch.full_like(total, SK * D * 1e60), rtol=1e-6, atol=0)
    total.sqrt().sum().backward()
    assert k.grad.isfinite().all()


def test_a_late_window_over_64k_keys():
    length, width = 65536, 16
    k = torch.randn(1, 1, length, 8, generator=torch.Generator().manual_seed(0))
    visibility = Visibility.of(k, k, causal=True, window=(width - 1, 0))
    ours = Statistics(k, visibility)
    windows = k.double().norm(dim=-1).unfold(-1, width, 1)[..., -1000:, :]
    exact = windows.sum(-1), windows.square().sum(-1), windows.amax(-1)
    for statistic, expected in zip(STATISTICS, exact, strict=True):
        error = (getattr(ours, statistic)[..., -1000:] - expected).abs() / expected
        assert error.max() < 1e-6, statistic


@pytest.mark.parametrize("summed", [0, ranges._SUMMED], ids=["segments", "doubling"])
def test_prefix_sums_begin_again(summed, monkeypatch):
    monkeypatch.setattr(ranges, "_SUMMED", summed)
    x, restarts = torch.arange(1.0, 8), torch.tensor([False, False, True, False, True, True, False])
    assert prefix_sum(x, restarts).tolist() == [0, 1, 3, 3, 7, 5, 6, 13]
    for count in (0, 1):
        assert prefix_sum(torch.ones(2, count), torch.ones(count).bool()).tolist() == [[0.0, 1.0][: count + 1]] * 2
    found = prefix_sum(torch.tensor([[torch.nan, 2.0, 3.0], [1.0, torch.inf, 4.0]]), torch.tensor([False, False, True]))
    assert found[:, 3].tolist() == [3, 4]


LENGTHS, TOTAL = (4, 9, 1, 7), 24  # and 3 rows and keys of no document
IDS = torch.tensor([0, 1, 2, 3, -1]).repeat_interleave(torch.tensor([*LENGTHS, 3]))[None]
OFFSETS = offsets(LENGTHS)
ORDER = torch.randperm(TOTAL, generator=torch.Generator().manual_seed(0))
DOCUMENTS = {
    "packed": {"sequences": Sequences(OFFSETS, OFFSETS, 9, 9)},
    "packed, causal": {"sequences": Sequences(OFFSETS, OFFSETS, 9, 9), "causal": True},
    "packed, window": {"sequences": Sequences(OFFSETS, OFFSETS, 9, 9), "window": (2, 1)},
    "ranges, causal": {"key_ranges": document_ranges(IDS), "causal": True},
    "ranges of rows in any order": {"key_ranges": document_ranges(IDS)[:, ORDER]},
}


@pytest.mark.parametrize("kind", [KernelStatistics, Statistics])
@pytest.mark.parametrize("poison", [torch.nan, torch.inf, 1e15])
@pytest.mark.parametrize("name", DOCUMENTS)
def test_no_bit_of_a_document_depends_on_a_key_of_another(name, poison, kind, monkeypatch):
    """Values and gradients, where the first document has a key, and gradients of its rows, that swallow all others."""
    monkeypatch.setattr(by_kernels, "kernels", torch_kernels)
    random = torch.Generator().manual_seed(0)
    k, g = torch.randn(1, HKV, TOTAL, D, generator=random), torch.randn(1, HKV, TOTAL, generator=random)
    first_rows = (IDS[0, ORDER] if "any order" in name else IDS[0]) == 0
    found = []
    for value in (None, poison):
        leaf, upstream = k.clone(), g.clone()
        if value is not None:
            leaf[:, 0, 2], upstream[:, :, first_rows] = value, value
        visible = Visibility.of(k.new_empty(1, HQ, TOTAL, D), leaf, **DOCUMENTS[name])
        statistics = kind(leaf.requires_grad_(), visible)
        for statistic in STATISTICS:
            values = getattr(statistics, statistic)
            d_k = torch.autograd.grad(values, leaf, upstream.to(values.dtype), retain_graph=True)[0]
            found.append((values.detach()[..., ~first_rows], d_k[:, :, LENGTHS[0] :]))
    for clean, dirty in zip(found[: len(STATISTICS)], found[len(STATISTICS) :], strict=True):
        assert all(map(torch.equal, clean, dirty))
        assert all(x.isfinite().all() for x in clean)


def test_norms_differentiate_twice():
    assert torch.autograd.gradgradcheck(key_norms_of, keys()[:1, :1, :2].requires_grad_())
