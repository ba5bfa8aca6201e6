"""The outputs and every gradient of a case against float64, within the bound."""

from __future__ import annotations

import torch
from torch import Tensor

from tests.kernels.harness import Tensors, as_double
from tests.support.bound import assert_within_bound

from .cases import FORMS, Case
from .executor import padded


def check(case: Case) -> None:
    """Run a case by backend "triton", which the emulator executes, and hold it to the bound."""
    tensors = case.tensors()
    exact = outcome(case, as_double(tensors), "reference")
    eager = outcome(case, tensors, "reference")
    for name, result in outcome(case, tensors, "triton").items():
        assert_within_bound(result, exact[name], eager[name], case.dtype, name=name)


def outcome(case: Case, tensors: Tensors, backend: str) -> Tensors:
    """out, the fields of aux, and gradients under random gradients of out and lse."""
    torch.manual_seed(0)  # of dropout
    leaves = {name: tensor.detach().requires_grad_() for name, tensor in tensors.items()}
    result = FORMS[case.form].attend(**leaves, **case.arguments, backend=backend)
    out, aux = result if isinstance(result, tuple) else (result, None)
    results = {"out": out}
    if aux is not None:
        results |= {name: torch.where(x == -torch.inf, 0, x) for name, x in zip(aux._fields, aux, strict=True)}
    targets = [results[name] for name in ("out", "lse") if name in results]
    random = torch.Generator().manual_seed(1)
    directions = [_direction(target, random) for target in targets]
    gradients = torch.autograd.grad(targets, list(leaves.values()), directions)
    return {name: x.detach() for name, x in results.items()} | {
        f"gradient of {name}": gradient for name, gradient in zip(leaves, gradients, strict=True)
    }


def _direction(target: Tensor, random: torch.Generator) -> Tensor:
    """The same numbers in every dtype: those of bfloat16."""
    numbers = torch.randn(target.shape, generator=random).bfloat16().to(target.dtype)
    return padded(numbers)
