"""Gradients of gradients: one error from every backend that has none."""

import pytest
import torch
from torch import Tensor

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
            with pytest.raises(RuntimeError, match=r"^tritonattn: gradients of gradients are not supported$"):
                torch.autograd.grad(gradient.square().sum(), leaf, retain_graph=True)


@pytest.mark.parametrize("call", CALLS)
def test_sdpa_refuses_them(call):
    assert_refused(call, "sdpa")
