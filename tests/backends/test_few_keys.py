"""All logits at once for a bias with a gradient over few keys: which calls take it, its bound, its backward."""

import pytest
import torch

import tritonattn
from tests.support.pairs import pairwise
from tritonattn.backends.cpu import few_keys

from .test_cpu import BOTH, DTYPES, check, direction, of_form, run

SHAPES = {"every pair": (2, 4, 21, 29), "windows": (1, 4, 21, 29), "keys": (2, 1, 1, 29), "pairs": (21, 29)}


@pytest.fixture
def taken(monkeypatch):
    """The answers of `takes` so far."""
    answers, takes = [], few_keys.takes
    monkeypatch.setattr(few_keys, "takes", lambda call: answers.append(takes(call)) or answers[-1])
    return answers


def biased(dtype=torch.float32, shape="windows", scales=()):
    tensors, arguments = of_form("plain", dtype, "full", 4, scales)
    random = torch.Generator().manual_seed(3)
    return tensors | {"bias": torch.randn(SHAPES[shape], generator=random).to(dtype)}, arguments


@pairwise(dtype=DTYPES, shape=SHAPES, scales=[(), BOTH, BOTH[:1]], scale=[0.3, -0.3, 0.0])
def test_every_bias(dtype, shape, scales, scale, taken):
    tensors, arguments = biased(dtype, shape, scales)
    check(tensors, **arguments | {"scale": scale})
    assert taken[-1]


NOT_TAKEN = {
    "a bias without a gradient": {"gradients": False},
    "a hidden pair": {"causal": True},
    "another term": {"softcap": 2.0},
    "statistics": {"return_aux": True},
    "dropout": {"dropout_p": 0.2},
    "batch_invariant": {"batch_invariant": True},
}


@pytest.mark.parametrize("case", NOT_TAKEN)
def test_other_calls(case, taken):
    tensors, arguments = biased()
    run(tensors, direction(tensors), **arguments | NOT_TAKEN[case])
    assert taken == [False]


@pytest.mark.parametrize(("keys", "is_few"), [(32, True), (33, False)])
def test_probabilities_take_no_more_memory_than_operands(keys, is_few, taken):
    q = torch.randn(1, 1, 3, 8)
    k = torch.randn(1, 1, keys, 8)
    tritonattn.attention(q, k, k, bias=torch.randn(3, keys, requires_grad=True))
    assert taken == [is_few]


def test_a_bias_that_hides_pairs_is_not_taken(taken):
    tensors, arguments = biased()
    tensors["bias"][..., 4], tensors["bias"][:, 1, 3] = -torch.inf, -torch.inf
    check(tensors, **arguments)
    assert taken[-1] is False


def test_a_lone_key_has_no_gradient():
    q, k, v = (torch.randn(1, 2, n, 8, requires_grad=True) for n in (5, 1, 1))
    out = tritonattn.attention(q, k, v, bias=torch.randn(5, 1, requires_grad=True))
    d_q, d_k = torch.autograd.grad(out, (q, k), torch.randn(out.shape))
    assert not d_q.any()
    assert not d_k.any()


def test_autocast_does_not_reach_the_backward():
    tensors, arguments = biased()
    leaves = {name: x.requires_grad_() for name, x in tensors.items()}
    out = tritonattn.scaled_attention(**leaves, **arguments)
    d_out = direction(tensors)
    plain = torch.autograd.grad(out, list(leaves.values()), d_out, retain_graph=True)
    with torch.autocast("cpu", torch.bfloat16):
        within = torch.autograd.grad(out, list(leaves.values()), d_out)
    assert all(map(torch.equal, within, plain))


def test_a_batch_of_output_gradients(taken):
    tensors, arguments = biased()
    leaves = {name: x.requires_grad_() for name, x in tensors.items()}
    out = tritonattn.scaled_attention(**leaves, **arguments)
    d_out = torch.randn(2, *out.shape)
    together = torch.autograd.grad(out, list(leaves.values()), d_out, is_grads_batched=True, retain_graph=True)
    for n in range(2):
        one = torch.autograd.grad(out, list(leaves.values()), d_out[n], retain_graph=True)
        torch.testing.assert_close([x[n] for x in together], list(one))
