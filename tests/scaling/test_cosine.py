"""The values of the cosine mode."""

import math

import pytest
import torch

from tritonattn import attention
from tritonattn.core.statistics import Statistics
from tritonattn.core.visibility import Visibility
from tritonattn.scaling import Cosine


def logits(scaling, q, k, **arguments):
    visibility = Visibility.of(q, k, **arguments)
    scales = scaling.scales(q, k, visibility, Statistics(k, visibility))
    return scales.constant * (q @ k.mT) * scales.query[..., None] * scales.key[:, :, None]


def inputs():
    generator = torch.Generator().manual_seed(0)
    return (torch.randn(1, 2, 5, 16, dtype=torch.float64, generator=generator) for _ in range(2))


@pytest.mark.parametrize("tau", [None, 10.0])
def test_logits_are_cosines(tau):
    q, k = inputs()
    cosine = torch.nn.functional.cosine_similarity(q[:, :, :, None], k[:, :, None], dim=-1)
    torch.testing.assert_close(logits(Cosine(tau), q, k), cosine * (tau or 4.0))


def test_lengths_whose_product_is_below_fp32():
    """Their factor is above it, and the products of q and k are 0 unless scales are folded into q and k."""
    q, k = (x.float() * size for x, size in zip(inputs(), (1e-20, 1e-25), strict=True))
    for backend in ("sdpa", "reference"):
        assert attention(q, k, torch.ones_like(k), scaling="cosine", backend=backend).isfinite().all()


@pytest.mark.parametrize("tau", [0, -1.0, math.nan, math.inf, "1"])
def test_bad_temperatures_are_refused(tau):
    with pytest.raises(ValueError, match=r"tau: expected a finite number above 0, got"):
        Cosine(tau)
