"""Cases of the forms of attention on a CPU: ours and peers, each held to float64 before it is timed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

import tritonattn
from tests.support.bound import PYTORCH_GRADIENT_BAND

from .attention import OURS, entrant_name
from .check import judge
from .contest import Contest, Entrant, Results, Verdict
from .forms import Form, Size, forms

_CALLS = 20  # of a decoding step, timed together


@dataclass(frozen=True)
class FormCase:
    """A form at a size, forward or forward and backward; the baseline is ours."""

    name: str
    size: Size
    dtype: str
    passes: str

    def contest(self) -> Contest:
        size = self.size
        axes = {
            "form": self.name,
            "length": size.length,
            "head_dim": size.head_dim,
            "dtype": self.dtype,
            "passes": self.passes,
            "scaling": size.scaling,
            "batch": size.batch,
            "heads": size.heads,
            "backend": "sdpa",
        }
        calls = _CALLS if self.name.startswith("decode") else 1
        baseline = entrant_name(OURS, size.scaling)
        return Contest("forms", axes, self.enter, baseline, torch.device("cpu"), calls=calls)

    def enter(self) -> list[Entrant]:
        form = next(one for one in forms(self.size) if one.name == self.name)
        d_out = torch.randn(form.leaves[0].shape[:-1] + form.leaves[2].shape[-1:]).to(form.leaves[0].dtype)
        check = _checker(form, self.size.scaling, d_out if self.backward else None)
        entrants = []
        for name, attend in ((OURS, form.ours), *form.peers.items()):
            ours = name == OURS
            judged = None if form.random and not ours else check
            run = self._running(form, attend, d_out)
            entrants.append(Entrant(entrant_name(name, self.size.scaling), self.size.scaling, run, judged, ours))
        return entrants

    @property
    def backward(self) -> bool:
        return self.passes != "forward"

    def _running(self, form: Form, attend: Callable[..., Any], d_out: Tensor) -> Callable[[], Callable[[int], Results]]:
        leaves = [x.detach().requires_grad_(self.backward) for x in form.leaves]

        def call(number: int) -> Results:
            if form.random:  # 0.2 ms, as long as a step of decoding
                torch.manual_seed(0)
            found = attend(*leaves)
            out = found[0] if isinstance(found, tuple) else found
            if not self.backward:
                return {"out": out}
            return {"out": out} | dict(zip(_names(form), torch.autograd.grad(out, leaves, d_out), strict=True))

        return lambda: call


def _names(form: Form) -> list[str]:
    return [f"gradient of {name}" for name in ("q", "k", "v", *([form.extra] if form.extra else []))]


def _checker(form: Form, scaling: str, d_out: Tensor | None) -> Callable[[Results], Verdict]:
    """Judge the first head by the reference, in float64 and in the operands' dtype; of the first entry, or of all.

    The gradient of a bias is a sum over entries.
    """
    entries = slice(None) if form.extra else slice(1)

    def first(x: Tensor) -> Tensor:
        return x[entries, :1] if x.dim() > 2 else x[:1]

    def answer(dtype: torch.dtype) -> Results:
        leaves = [first(x).to(dtype).requires_grad_(d_out is not None) for x in form.leaves]
        arguments = {name: _first(name, x, dtype) for name, x in form.arguments.items()}
        if form.extra:
            arguments[form.extra] = leaves[3]
        torch.manual_seed(0)
        out = tritonattn.attention(*leaves[:3], scaling=scaling, backend="reference", **arguments)
        assert isinstance(out, Tensor)
        if d_out is None:
            return {"out": out.detach()}
        found = torch.autograd.grad(out, leaves, first(d_out).to(dtype))
        return {"out": out.detach()} | dict(zip(_names(form), found, strict=True))

    dtype = form.leaves[0].dtype
    exact, eager = answer(torch.float64), answer(dtype)

    def check(results: Results) -> Verdict:
        parts = {name: first(x).detach() for name, x in results.items()}
        return judge(parts, exact, eager, dtype, PYTORCH_GRADIENT_BAND)

    return check


def _first(name: str, x: Any, dtype: torch.dtype) -> Any:
    """An argument for the first entry and head."""
    if not isinstance(x, Tensor):
        return x
    if name in ("key_lengths", "key_ranges", "sinks"):
        return x[:1]
    x = x[:1, :1] if x.dim() > 2 else x
    return x.to(dtype) if x.is_floating_point() else x
