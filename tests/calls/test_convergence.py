"""A mini-model trained through the CPU path follows the reference's loss curve; in tests/slow for every mode."""

import pytest

from tests.support.convergence import BAND, losses

STEPS = 30


@pytest.mark.parametrize("mode", ["key_norm_max", "cosine", "ssmax", "power_law"])
def test_the_cpu_path_follows_the_reference(mode):
    assert_follows(mode, STEPS)


@pytest.mark.parametrize("mode", ["sqrt_dim", "key_norm_sum", "learned_cosine"])
def test_a_backward_pass_with_another_scale_leaves_the_band(mode):
    sound, faulty = (losses(mode, "sdpa", STEPS, fault=fault) for fault in (1.0, 1.1))
    assert (sound - faulty).abs().max() > 5 * BAND


def assert_follows(mode: str, steps: int) -> None:
    wanted, got = (losses(mode, backend, steps) for backend in ("reference", "sdpa"))
    assert wanted[-1] < 0.7 * wanted[0]  # it learns
    assert (got - wanted).abs().max() < BAND
