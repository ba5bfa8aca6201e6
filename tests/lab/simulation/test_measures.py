"""The sweep's measures against the formulas, and its samples."""

import pytest
import torch

from tritonattn import attention
from tritonattn.lab.simulation.measures import Point, Sample, measure

CPU = torch.device("cpu")


@pytest.mark.parametrize("mode", ["sqrt_dim", "key_norm_sum", "cosine", "log_key_count"])
@pytest.mark.parametrize("keys", ["gaussian", "log-normal", "half zeros"])
def test_gradients_are_those_of_the_reference(mode, keys):
    sample = Sample.of(Point(keys, 300, 8), 1, CPU)
    q, k = sample.q.clone().requires_grad_(), sample.k.clone().requires_grad_()
    out = attention(q, k, sample.v, scaling=mode, backend="reference")
    (out * sample.weights).sum().backward()
    ours = measure(sample, mode)
    assert ours.q_gradient == pytest.approx(q.grad.norm(dim=-1).mean().item(), rel=1e-9)
    assert ours.k_gradient == pytest.approx((k.grad.square().sum((1, 2, 3)) / 32).sqrt().mean().item(), rel=1e-9)
