"""Bernhard's simulation: its values by the formulas of the paper, and the two readings of its figures."""

import math

import pytest
import torch

from tritonattn.lab.simulation import paper
from tritonattn.lab.simulation.paper import KEYS, measures_of, operands, softmax_of

CPU = torch.device("cpu")
DIVISORS = {
    "none": lambda keys: 1.0,
    "sqrt_dim": lambda keys: math.sqrt(keys.shape[1]),
    "key_norm_sum": lambda keys: keys.norm(dim=1).sum(),
}


def by_formula(dim, mode, seed=0):
    q, k = (x[0, 0] for x in operands(dim, seed, CPU))
    return torch.softmax(q @ k.T / DIVISORS[mode](k), dim=1)


@pytest.mark.parametrize(("dim", "mode"), paper.ROWS)
def test_probabilities_and_their_measures(dim, mode):
    expected = by_formula(dim, mode)
    torch.testing.assert_close(softmax_of(*operands(dim, 0, CPU), mode), expected)
    ours = measures_of(dim, mode, 0, CPU)
    assert ours["max_probability"] == pytest.approx(expected.amax(1).mean().item())
    assert ours["relative_entropy"] == pytest.approx(
        (torch.special.entr(expected).sum(1) / math.log(KEYS)).mean().item()
    )
    assert ours["output_variance"] == pytest.approx(expected.var(1, correction=0).mean().item())
    assert ours["component_variance"] == pytest.approx(expected[:, 0].var().item())
    jacobians = torch.diag_embed(expected) - expected[:, :, None] * expected[:, None]
    assert ours["jacobian_norm"] == pytest.approx(jacobians.norm(dim=(1, 2)).mean().item())
    divisor = float(DIVISORS[mode](operands(dim, 0, CPU)[1][0, 0]))
    assert ours["gradient_norm"] == pytest.approx(ours["jacobian_norm"] / divisor)
