"""The fused pass over the keys and its way back."""

from __future__ import annotations

import pytest
import torch

from tests.support.masks import MASKS
from tritonattn import triton_backend
from tritonattn.ops import KernelStatistics
from tritonattn.statistics import Statistics, key_lengths_of
from tritonattn.visibility import Visibility


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("k_len", "head_dim"), [(1, 16), (37, 5), (130, 64), (1500, 8)])
def test_lengths_and_prefix_sums(dtype, k_len, head_dim, device):
    k = torch.randn(2, 2, k_len, head_dim, generator=torch.Generator().manual_seed(0)).to(dtype).to(device)
    lengths, length_prefix, square_prefix = triton_backend.key_statistics(k, None)
    exact = k.double().norm(dim=-1)
    torch.testing.assert_close(lengths.double(), exact, rtol=1e-6, atol=0)
    for prefix, terms in ((length_prefix, lengths.double()), (square_prefix, lengths.double().square())):
        assert (prefix[..., 0] == 0).all()
        torch.testing.assert_close(prefix[..., 1:], terms.cumsum(-1), rtol=1e-12, atol=0)


def test_unseen_keys_count_nothing(device):
    k = torch.ones(1, 1, 4, 16, device=device)
    k[:, :, 2] = float("nan")
    seen = torch.tensor([True, True, False, True], device=device)
    lengths, length_prefix, _ = triton_backend.key_statistics(k, seen)
    assert lengths.flatten().tolist() == [4, 4, 0, 4]
    assert length_prefix.flatten().tolist() == [0, 4, 8, 8, 12]


@pytest.mark.parametrize("size", [1e30, 1e-30, 0.0])
def test_any_finite_length(size, device):
    k = torch.full((1, 1, 3, 16), size, device=device)
    lengths, _, square_prefix = triton_backend.key_statistics(k, None)
    torch.testing.assert_close(lengths, torch.full_like(lengths, 4 * size), rtol=1e-6, atol=0)
    assert square_prefix.isfinite().all()
    d_k = triton_backend.key_statistics_backward(k, None, lengths, torch.ones_like(lengths))
    torch.testing.assert_close(d_k, torch.full_like(k, 0.25 if size else 0.0), rtol=1e-6, atol=0)


@pytest.mark.parametrize("mask", ["full", "causal", "ranges"])
def test_statistics_equal_those_of_torch(mask, device):
    k = torch.randn(2, 2, 40, 24, generator=torch.Generator().manual_seed(0)).to(device)
    arguments = {
        name: x.to(device) if isinstance(x, torch.Tensor) else x for name, x in MASKS[mask](2, 4, 21, 40).items()
    }
    visibility = Visibility.of(k.new_empty(2, 4, 21, 24), k, **arguments)
    results = []
    for kind in (KernelStatistics, Statistics):
        leaf = k.clone().requires_grad_()
        statistics = kind(leaf, visibility)
        values = [statistics.length_sum, statistics.length_square_sum, statistics.length_max]
        weights = torch.linspace(-1, 2, 21, device=device)
        total = sum((value * weights).sum() for value in values)
        results.append([*(value.detach() for value in values), torch.autograd.grad(total, leaf)[0]])
    for found, expected in zip(*results, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_backward_matches_autograd(device):
    random = torch.Generator().manual_seed(0)
    k = torch.randn(1, 2, 33, 20, generator=random).to(device)
    k[:, :, 3] = 0
    d_lengths = torch.randn(1, 2, 33, generator=random).to(device)
    leaf = k.double().requires_grad_()
    (key_lengths_of(leaf) * d_lengths).sum().backward()
    found = triton_backend.key_statistics_backward(k, None, triton_backend.key_statistics(k, None)[0], d_lengths)
    torch.testing.assert_close(found.double(), leaf.grad, rtol=1e-6, atol=1e-6)
