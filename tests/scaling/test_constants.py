"""The values of the constant modes."""

import pytest
import torch

from tritonattn.core.statistics import Statistics
from tritonattn.core.visibility import Visibility
from tritonattn.scaling import SCALINGS


@pytest.mark.parametrize(("mode", "factor"), [("sqrt_dim", 0.25), ("dim", 0.0625), ("none", 1.0)])
def test_values(mode, factor):
    q = k = torch.randn(1, 1, 3, 16)
    visibility = Visibility.of(q, k)
    scales = SCALINGS[mode]().scales(q, k, visibility, Statistics(k, visibility))
    assert (scales.constant, scales.query, scales.key) == (factor, None, None)
    assert SCALINGS[mode]().multiplier(q, k, visibility.dense()).item() == factor
