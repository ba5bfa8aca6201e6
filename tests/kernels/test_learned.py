"""Learned scalings through the kernels: gradients of their parameters, and repetition to the bit."""

import pytest
import torch

import tritonattn
from tests.kernels import harness
from tests.support.bound import assert_within_bound
from tests.support.learned import learned

pytestmark = pytest.mark.usefixtures("small_tiles")


def outcome(scaling, tensors, **arguments):
    """out and the gradients of q, k, v and of the scaling's parameters."""
    leaves = {name: tensor.detach().requires_grad_() for name, tensor in tensors.items()}
    out = tritonattn.attention(**leaves, scaling=scaling, causal=True, **arguments)
    direction = torch.linspace(-1, 1, out.numel(), device=out.device).reshape(out.shape)
    named = {**leaves, **dict(scaling.named_parameters())}
    gradients = torch.autograd.grad((out * direction.to(out.dtype)).sum(), list(named.values()))
    return {"out": out.detach(), **dict(zip(named, gradients, strict=True))}


@pytest.mark.parametrize(("case", "dtype"), [("per_head of cosine", torch.float32), ("power_law", torch.bfloat16)])
def test_against_float64(case, dtype, device):
    scaling = learned(case).to(device)
    tensors = harness.inputs(dtype, device, batch=1, kv_heads=2, q_len=20, k_len=33)
    exact = outcome(scaling, harness.as_double(tensors), backend="reference")
    eager = outcome(scaling, tensors, backend="reference")
    ours, again = (outcome(scaling, tensors, backend="triton") for _ in range(2))
    for name, x in ours.items():
        assert torch.equal(x, again[name]), name
        assert_within_bound(x, exact[name], eager[name], dtype, name)
