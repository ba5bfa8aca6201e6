"""Gradients of the entropy and of the largest logit by the kernels; `harness.check` has them in every test with aux."""

import pytest
import torch

import tritonattn
from tests.kernels import harness
from tests.support.bound import assert_within_bound
from tritonattn import nn

TERMS = ("query_scale", "key_scale", "sinks of rows", "key_bias", "bias", "relative_bias", "relative_scale")

pytestmark = pytest.mark.usefixtures("small_tiles")


def gradients(tensors, result, attend=tritonattn.scaled_attention, **options):
    leaves = {name: x.detach().requires_grad_() for name, x in tensors.items()}
    _, aux = attend(**leaves, return_aux=True, **options)
    x = getattr(aux, result)
    weight = torch.linspace(-1, 2, x.numel()).reshape(x.shape).to(x)
    loss = (torch.where(x == -torch.inf, 0, x) * weight).sum()
    return dict(zip(leaves, torch.autograd.grad(loss, list(leaves.values()), materialize_grads=True), strict=True))


@pytest.mark.parametrize(("softcap", "after"), [(None, False), (1.5, False), (1.5, True)])
@pytest.mark.parametrize("result", ["entropy", "max_logit"])
def test_every_term(result, softcap, after, device):
    """Alone, so that no larger gradient of the output hides theirs."""
    tensors = harness.inputs(torch.float32, device, scales=TERMS)
    options = {"causal": True, "softcap": softcap, "bias_after_softcap": after, "dropout_p": 0.3}
    ours = gradients(tensors, result, backend="triton", **options)
    exact = gradients(harness.as_double(tensors), result, backend="reference", **options)
    eager = gradients(tensors, result, backend="reference", **options)
    for name, x in ours.items():
        assert_within_bound(x, exact[name], eager[name], torch.float32, name=name)
    assert not ours["v"].any()
    assert not ours["sinks"].any()
    assert ours["k"].any()


@pytest.mark.filterwarnings("ignore:.* encountered in")  # of the interpreter, over what is hidden then
def test_hidden_keys_of_any_size_add_nothing(device):
    """P of 0 meets the product of a hidden logit and the entropy's gradient, which passes fp32."""
    tensors = harness.inputs(torch.float32, device, q_len=35)
    shorter = {name: x[:, :, :-1] for name, x in tensors.items()}
    tensors["k"] = tensors["k"].clone()
    tensors["k"][:, :, -1] = 1e37  # which the last row alone attends to
    found = []
    for operands in (tensors, shorter):
        leaves = {name: x.clone().requires_grad_() for name, x in operands.items()}
        _, aux = tritonattn.attention(**leaves, causal=True, return_aux=True, backend="triton")
        (100 * aux.entropy[:, :, :34]).sum().backward()
        found.append(leaves["q"].grad[:, :, :34])
    torch.testing.assert_close(*found, rtol=1e-5, atol=1e-4)


def test_a_learned_scaling(device):
    tensors = harness.inputs(torch.float32, device)
    found = []
    for backend, operands in (("triton", tensors), ("reference", harness.as_double(tensors))):
        scaling = nn.SSMax(2).to(device)
        _, aux = tritonattn.attention(**operands, scaling=scaling, causal=True, return_aux=True, backend=backend)
        found.append(torch.autograd.grad(aux.entropy.sum(), list(scaling.parameters())))
    for ours, exact in zip(*found, strict=True):
        torch.testing.assert_close(ours, exact.to(ours), rtol=1e-4, atol=1e-4)
