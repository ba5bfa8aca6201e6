"""One temperature for a batch: reach by its definition, and where a scaling has to do better or no better."""

import pytest
import torch

from tritonattn.lab.simulation.measures import statistics_of
from tritonattn.lab.simulation.verdict import Batch, Condition, Curves, reach_of

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def batches():
    """Batches with the curves of their rows."""
    drawn = {one.name: Batch.of(one, 4, 0, CPU) for one in (Condition("same"), Condition("counts", fold=16))}
    return {name: (batch, Curves(batch, "none")) for name, batch in drawn.items()}


@pytest.mark.parametrize("name", ["same", "counts"])
def test_reach_is_the_share_of_the_rows_own_best(batches, name):
    """Against a search over gains for each row, by its own keys alone."""
    batch, curves = batches[name]
    spread = statistics_of(batch.q, batch.k, "sqrt_dim", key_lengths=batch.key_lengths).logit_std
    ours = curves.at(spread.flatten()).view_as(spread)
    for one in (0, 3):
        q, k = batch.q[one : one + 1], batch.k[one : one + 1, :, : batch.key_lengths[one]]
        gains = 2 ** torch.arange(-4, 8, 0.1, dtype=torch.float64)
        norms = torch.stack(
            [statistics_of(q, k, "sqrt_dim", gain=gain.expand(1, 1, 4)).gradient_norm for gain in gains]
        )
        own = statistics_of(q, k, "sqrt_dim").gradient_norm / norms.amax(0)
        torch.testing.assert_close(ours[one : one + 1], own, rtol=0.03, atol=1e-3)


def test_sums_of_lengths_lose_where_counts_vary(batches):
    plain, sums, means = (
        reach_of(batches["counts"][0], mode, batches["counts"][1])
        for mode in ("sqrt_dim", "key_norm_sum", "key_norm_mean")
    )
    assert sums.tuned < plain.tuned - 0.05
    assert sums.unevenness > 3 * plain.unevenness
    assert means.tuned == pytest.approx(plain.tuned, abs=1e-6)
