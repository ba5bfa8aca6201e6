"""A mini-model trained through the kernels follows the reference's loss curve."""

import pytest

from tests.support.convergence import BAND, losses

pytestmark = pytest.mark.usefixtures("small_tiles")

SIZES = {"batch": 1, "length": 18, "heads": 1, "rate": 0.5}  # two tiles of keys
STEPS = 3


@pytest.mark.parametrize("mode", ["sqrt_dim", "key_norm_max", "cosine", "power_law"])
def test_the_kernels_follow_the_reference(mode, device):
    wanted, got = (losses(mode, backend, STEPS, device=device, **SIZES) for backend in ("reference", "triton"))
    assert (got - wanted).abs().max() < BAND


@pytest.mark.parametrize("mode", ["sqrt_dim", "power_law"])
def test_a_backward_pass_with_another_scale_leaves_the_band(mode, device):
    wanted = losses(mode, "reference", STEPS, device=device, **SIZES)
    got = losses(mode, "triton", STEPS, device=device, fault=1.1, **SIZES)
    assert (got - wanted).abs().max() > BAND
