"""Gradients of gradients: one error from every backend that has none, and the reference's are right."""

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


def first_order(
    call: str, backend: str, device: torch.device | str = "cpu", graph: bool = True
) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
    """The leaves q, k and v [1, 2, 20, 8] of a call, and the gradients of its objective."""
    function, options = CALLS[call]
    generator = torch.Generator().manual_seed(0)
    leaves = tuple(torch.randn(1, 2, 20, 8, generator=generator).to(device).requires_grad_() for _ in range(3))
    objective = function(*leaves, backend=backend, **options).square().sum()
    return leaves, torch.autograd.grad(objective, leaves, create_graph=graph)


def assert_refused(call: str, backend: str, device: torch.device | str = "cpu") -> None:
    leaves, gradients = first_order(call, backend, device)
    for gradient in gradients:
        for leaf in leaves:
            with pytest.raises(RuntimeError, match=r"^tritonattn: gradients of gradients are not supported$"):
                torch.autograd.grad(gradient.square().sum(), leaf, retain_graph=True)


@pytest.mark.parametrize("call", CALLS)
def test_sdpa_refuses_them(call):
    assert_refused(call, "sdpa")


@pytest.mark.parametrize("call", CALLS)
def test_the_reference_has_them(call):
    leaves, gradients = first_order(call, "reference")
    second = torch.autograd.grad(sum(x.square().sum() for x in gradients), leaves)
    assert all(bool(x.isfinite().all()) and bool(x.any()) for x in second)
