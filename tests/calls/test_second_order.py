"""Gradients of gradients, and forward mode: one error from every backend that has none."""

import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad

import tritonattn


def packed(q: Tensor, k: Tensor, v: Tensor, **options) -> Tensor:
    """q, k and v as two sequences of `attention_varlen`."""
    length = q.shape[2]
    starts = torch.tensor([0, 5, length], dtype=torch.int32, device=q.device)
    q, k, v = (x[0].transpose(0, 1) for x in (q, k, v))
    return tritonattn.attention_varlen(q, k, v, starts, starts, length, length, **options)


def scaled(q: Tensor, k: Tensor, v: Tensor, **options) -> Tensor:
    return tritonattn.scaled_attention(q, k, v, q.square().mean(-1), k.square().mean(-1), **options)


CALLS = {
    "full": (tritonattn.attention, {}),
    "causal": (tritonattn.attention, {"causal": True}),
    "key norms": (tritonattn.attention, {"scaling": "key_norm_sum", "causal": True}),
    "cosine in a window": (tritonattn.attention, {"scaling": "cosine", "window": (3, 0)}),
    "explicit scales": (scaled, {}),
    "packed": (packed, {"causal": True}),
}


def assert_refused(call: str, backend: str, device: torch.device | str = "cpu") -> None:
    function, options = CALLS[call]
    leaves = [x.requires_grad_() for x in torch.randn(3, 1, 2, 20, 8, device=device).unbind()]
    objective = function(*leaves, backend=backend, **options).square().sum()
    for gradient in torch.autograd.grad(objective, leaves, create_graph=True):
        for leaf in leaves:
            with pytest.raises(RuntimeError, match=r"gradients of gradients .* backend=.reference. has them$"):
                torch.autograd.grad(gradient.square().sum(), leaf, retain_graph=True)


@pytest.mark.parametrize("call", CALLS)
def test_sdpa_refuses_them(call):
    assert_refused(call, "sdpa")


def tangent_of(function, backend: str, argument: int, transform: bool, **options) -> Tensor:
    """The directional derivative along a fixed tangent of one of q, k and v, by torch.func or by dual numbers."""
    generator = torch.Generator().manual_seed(0)
    tensors = [torch.randn(1, 2, 20, 8, generator=generator, dtype=torch.float64) for _ in range(4)]
    along = tensors.pop()

    def run(x: Tensor) -> Tensor:
        return function(*tensors[:argument], x, *tensors[argument + 1 :], backend=backend, **options)

    if transform:
        return torch.func.jvp(run, (tensors[argument],), (along,))[1]
    with forward_ad.dual_level():
        return forward_ad.unpack_dual(run(forward_ad.make_dual(tensors[argument], along))).tangent


@pytest.mark.filterwarnings("ignore:.torch.jit.script")
@pytest.mark.parametrize("transform", [True, False])
@pytest.mark.parametrize("call", CALLS)
def test_forward_mode_is_refused_but_by_the_reference(call, transform):
    function, options = CALLS[call]
    for argument, name in enumerate("qkv"):
        error = f"^{name}: expected no tangent with backend 'sdpa', got one: .*backend=\"reference\" has them$"
        with pytest.raises(NotImplementedError, match=error):
            tangent_of(function, "sdpa", argument, transform, **options)
        assert tangent_of(function, "reference", argument, transform, **options).isfinite().all()


@pytest.mark.filterwarnings("ignore:.torch.jit.script")
def test_forward_mode_towards_a_learned_scaling_is_refused():
    scaling = tritonattn.nn.SSMax(heads=2)
    q = torch.randn(1, 2, 20, 8)
    with forward_ad.dual_level():
        del scaling.s  # a parameter cannot be a dual
        scaling.s = forward_ad.make_dual(torch.ones(2), torch.ones(2))
        tritonattn.attention(q, q, q, causal=True)  # no tensor of this one has a tangent
        with pytest.raises(NotImplementedError, match=r"^query_scale: expected no tangent"):
            tritonattn.attention(q, q, q, scaling=scaling, causal=True)
