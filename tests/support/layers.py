"""Layers held against others."""

from typing import Any

import torch


def assert_same(layer, ours, expected, *inputs) -> None:
    """Two outputs in fp64 agree, and so do their gradients at the inputs and the layer's parameters."""
    torch.testing.assert_close(ours, expected, rtol=1e-10, atol=1e-12)
    leaves = [*inputs, *(x for x in layer.parameters() if x.requires_grad)]
    direction = torch.linspace(-1, 1, ours.numel(), dtype=torch.float64).reshape(ours.shape)
    gradients = [torch.autograd.grad((x * direction).sum(), leaves) for x in (ours, expected)]
    torch.testing.assert_close(*gradients, rtol=1e-9, atol=1e-11)


def with_gradients(model, *arguments, more=(), **options) -> tuple[torch.Tensor, tuple[Any, ...]]:
    """A model's output, and the gradients of the sum of its squares at its parameters and at more leaves."""
    out = model(*arguments, **options)
    leaves = [*(x for x in model.parameters() if x.requires_grad), *more]
    return out, torch.autograd.grad(out.square().sum(), leaves, allow_unused=True)
