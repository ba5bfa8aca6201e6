"""A call of a public function, and its check against float64."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tests.support.bound import assert_within_bound

Tensors = dict[str, Tensor]


@dataclass(frozen=True)
class Trial:
    """A call: attend(**leaves, backend=...) returns out, or out and AttentionAux.

    leaves     random tensors in dtype (scales fp32), with gradients where `gradients`
    stages     stages of the software pipeline, None for each kernel's default
    invariant  kernels are asked for batch_invariant, which the reference does not have
    """

    seed: int
    function: str
    dtype: torch.dtype
    leaves: Tensors
    options: dict[str, Any]
    attend: Callable[..., Any]
    gradients: bool = True
    stages: int | None = None
    invariant: bool = False

    def __str__(self) -> str:
        shapes = {name: list(tensor.shape) for name, tensor in self.leaves.items()}
        options = {
            name: list(value.shape) if isinstance(value, Tensor) and value.numel() > 8 else value
            for name, value in self.options.items()
        }
        stages = "" if self.stages is None else f" in {self.stages} stages"
        return f"{self.function} of {self.dtype}{stages}{', batch_invariant' * self.invariant}, {shapes}, {options}"

    def check(self) -> None:
        """Raise AssertionError unless two runs agree bit for bit, and with float64 within the tests' bound."""
        ours, again = (self.results("triton", self.leaves) for _ in range(2))
        eager = self.results("reference", self.leaves)
        double = {name: tensor.double() for name, tensor in self.leaves.items()}
        exact = self.results("reference", double)
        summands = self._summands(double, exact)
        for name, result in ours.items():
            assert torch.equal(result.view(torch.uint8), again[name].view(torch.uint8)), f"{name}: a second run differs"
            hidden = exact[name].isneginf()  # lse and max_logit of a row without keys
            assert torch.equal(result.isneginf(), hidden), f"{name}: expected -inf for the rows without keys, only"
            values = (x.masked_fill(hidden, 0) for x in (result, exact[name], eager[name]))
            assert_within_bound(*values, self.dtype, name, summands.get(name, 0.0))

    def results(self, backend: str, leaves: Tensors) -> Tensors:
        """Compute the function's results, and the gradients of random gradients of them."""
        leaves = {name: tensor.detach().requires_grad_(self.gradients) for name, tensor in leaves.items()}
        named = self._call(backend, leaves, self.options)
        results = {name: tensor.detach() for name, tensor in named.items()}
        if not self.gradients:
            return results
        differentiable = {name: named[name] for name in ("out", "lse") if name in named}
        given = [self._d_out(x) for x in differentiable.values()]
        found = torch.autograd.grad(list(differentiable.values()), list(leaves.values()), given)
        return results | {f"gradient of {name}": x for name, x in zip(leaves, found, strict=True)}

    def _call(self, backend: str, leaves: Tensors, options: dict[str, Any]) -> Tensors:
        torch.manual_seed(self.seed)  # of dropout
        invariant = self.invariant and backend == "triton"
        result = self.attend(**leaves, **options, backend=backend, batch_invariant=invariant)
        if not isinstance(result, tuple):
            return {"out": result}
        return {"out": result[0], **result[1]._asdict()}

    def _d_out(self, x: Tensor) -> Tensor:
        random_numbers = torch.Generator().manual_seed(self.seed)
        return torch.randn(x.shape, generator=random_numbers).to(self.dtype).to(x.device, x.dtype)

    def _summands(self, double: Tensors, exact: Tensors) -> dict[str, float]:
        """Bound the summands that cancel in a result, which may be far larger than the result itself.

        Logarithms are as exact as their arguments, 1 at least. The entropy is lse minus the mean logit.
        Gradients of logits are d_out[i] . v[j] - d_out[i] . out[i]: the largest d_out . v, times the gradient of the
        sum of ln(exp(lse) + exp(sink)).
        """
        sizes = {}
        if "lse" in exact:
            largest = exact["lse"].nan_to_num(neginf=0.0).abs().max().item()
            sizes = dict.fromkeys(("lse", "max_logit", "entropy"), max(largest, 1.0))
        if not self.gradients:
            return sizes
        leaves = {name: tensor.detach().requires_grad_() for name, tensor in double.items()}
        named = self._call("reference", leaves, self.options | {"return_aux": True})
        has_keys = named["lse"].isfinite()
        total = named["lse"][has_keys]
        if "sinks" in leaves:
            of_rows = leaves["sinks"] if leaves["sinks"].dim() > 1 else leaves["sinks"][:, None]
            total = torch.logaddexp(total, of_rows.expand_as(has_keys)[has_keys])
        found = torch.autograd.grad(total.sum(), list(leaves.values()), allow_unused=True, materialize_grads=True)
        value = leaves["v"].nan_to_num().norm(dim=-1).max() * self._d_out(named["out"]).norm(dim=-1).max()
        kept = 1 - self.options.get("dropout_p", 0.0)
        # Random vectors are almost orthogonal: their largest products are about 4 / sqrt(Dv) of the longest.
        product = value.item() * min(1.0, 4 * leaves["v"].shape[-1] ** -0.5) / kept
        gradients = {f"gradient of {name}": x for name, x in zip(leaves, found, strict=True)}
        return sizes | {name: product * x.abs().max().item() for name, x in gradients.items()}
