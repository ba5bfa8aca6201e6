"""One check for all kernel tests: outputs and every gradient against float64, within the bound."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

import tritonattn
from tests.support.bound import assert_within_bound

NAMES = ("q", "k", "v", "query_scale", "key_scale", "gain")
Tensors = dict[str, Tensor]


def inputs(
    dtype: torch.dtype,
    device: torch.device,
    *,
    batch: int = 2,
    kv_heads: int = 1,
    group: int = 2,
    q_len: int = 37,
    k_len: int = 53,
    head_dim: int = 16,
    value_dim: int = 16,
    scales: tuple[str, ...] = (),
    seed: int = 0,
) -> Tensors:
    """Random q, k, v and the scales asked for, of either sign, some of them 0."""
    random = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=random)

    heads = kv_heads * group
    tensors = {
        "q": normal(batch, heads, q_len, head_dim).to(dtype),
        "k": normal(batch, kv_heads, k_len, head_dim).to(dtype),
        "v": normal(batch, kv_heads, k_len, value_dim).to(dtype),
    }
    if "query_scale" in scales:
        tensors["query_scale"] = normal(batch, heads, q_len)
        tensors["query_scale"][..., ::7] = 0
    if "key_scale" in scales:
        tensors["key_scale"] = normal(batch, kv_heads, k_len)
        tensors["key_scale"][..., ::5] = 0
    if "gain" in scales:
        tensors["gain"] = normal(heads, 1).abs() + 0.5
    return {name: tensor.to(device) for name, tensor in tensors.items()}


def check(tensors: Tensors, attend: Callable[..., Any] = tritonattn.scaled_attention, **arguments: Any) -> None:
    """Hold backend "triton" to the bound: out and the gradient of every tensor, for a random gradient of out."""
    dtype = tensors["q"].dtype
    shape = (*tensors["q"].shape[:3], tensors["v"].shape[3])
    random = torch.Generator().manual_seed(1)
    d_out = torch.randn(shape, generator=random).to(dtype).to(tensors["q"].device)
    exact = run(as_double(tensors), d_out, attend, backend="reference", **arguments)
    eager = run(tensors, d_out, attend, backend="reference", **arguments)
    ours = run(tensors, d_out, attend, backend="triton", **arguments)
    for name, result in ours.items():
        assert_within_bound(result, exact[name], eager[name], dtype, name=name)


def run(tensors: Tensors, d_out: Tensor, attend: Callable[..., Any], **arguments: Any) -> Tensors:
    """out and the gradients of a call."""
    leaves = {name: tensor.detach().requires_grad_() for name, tensor in tensors.items()}
    out = attend(**leaves, **arguments)
    gradients = torch.autograd.grad(out, list(leaves.values()), d_out.to(out.dtype))
    return {"out": out.detach(), **dict(zip(leaves, gradients, strict=True))}


def as_double(tensors: Tensors) -> Tensors:
    return {name: tensor.double() for name, tensor in tensors.items()}
