"""Errors against float64, bounded by those of an eager computation with the same roundings."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

import tritonattn
from tests.support.bound import BAND, allowed_error

from .contest import Results, Verdict
from .recipes import CONSTANTS

# Logits of a head in memory at once, in fp64 and several times over.
_LOGITS = 2**23

# Roundings to the operands' dtype, next to that of P, in the eager computation that sets a contestant's bound.
#   "P"           nothing: logits and scales are fp32
#   "operands"    q and k times their scales, as where a caller scales before the call
#   "logits"      the product of q and k
ROUNDINGS = ("P", "operands", "logits")


@dataclass(frozen=True)
class Question:
    """Attention of a head: q [1, H, Sq, D], k and v [1, 1, Sk, D], Sq <= Sk; d_out like q, or None for no gradients."""

    q: Tensor
    k: Tensor
    v: Tensor
    d_out: Tensor | None
    causal: bool

    @functools.cached_property
    def _answers(self) -> dict[tuple[str, str | None], Results]:
        return {}

    def exact(self, scaling: str) -> Results:
        return self._answer(scaling, None)

    def eager(self, scaling: str, rounding: str) -> Results:
        return self._answer(scaling, rounding)

    def _answer(self, scaling: str, rounding: str | None) -> Results:
        """Compute the results in float64, or in the operands' dtype with a rounding of ROUNDINGS; kept."""
        if (scaling, rounding) not in self._answers:
            dtype = torch.float64 if rounding is None else self.q.dtype
            leaves = [x.detach().to(dtype).requires_grad_(self.d_out is not None) for x in (self.q, self.k, self.v)]
            self._answers[scaling, rounding] = _by_rows(self, leaves, scaling, rounding)
        return self._answers[scaling, rounding]


def _by_rows(question: Question, leaves: list[Tensor], scaling: str, rounding: str | None) -> Results:
    """Compute out and gradients by blocks of rows, so that memory does not grow with Sq Sk."""
    q, k, _ = leaves
    wide = torch.promote_types(q.dtype, torch.float32)
    sums = [torch.zeros_like(x, dtype=wide) for x in leaves]
    outs = []
    block = max(1, _LOGITS // (k.shape[2] * q.shape[1]))
    for first in range(0, q.shape[2], block):
        rows = slice(first, min(first + block, q.shape[2]))
        out = _attend(leaves, rows, scaling, question.causal, rounding)
        outs.append(out.detach())
        if question.d_out is not None:
            given = question.d_out[:, :, rows].to(out.dtype)
            for total, part in zip(sums, torch.autograd.grad(out, leaves, given), strict=True):
                total += part
    results = {"out": torch.cat(outs, dim=2)}
    if question.d_out is None:
        return results
    found = (total.to(x.dtype) for total, x in zip(sums, leaves, strict=True))
    return results | {f"gradient of {name}": x for name, x in zip("qkv", found, strict=True)}


def _attend(leaves: list[Tensor], rows: slice, scaling: str, causal: bool, rounding: str | None) -> Tensor:
    """Compute some rows of attention from its definition, with the keys that these rows attend to in the whole.

    Only the mode's dense formula is taken from the package, since the package is under test.
    """
    q, k, v = leaves
    wide = torch.promote_types(q.dtype, torch.float32)
    positions = torch.arange(rows.start, rows.stop, device=q.device)[:, None] + (k.shape[2] - q.shape[2])
    visible = torch.arange(k.shape[2], device=q.device)[None] <= (
        positions if causal else k.shape[2]
    )  # [rows or 1, Sk]
    differs_by_row = causal and q.shape[2] > 1
    is_vector = scaling not in CONSTANTS and (differs_by_row or tritonattn.SCALINGS[scaling].about.reads_norms)
    q = q[:, :, rows]
    keys = k.expand(-1, q.shape[1], -1, -1)
    factor = tritonattn.SCALINGS[scaling]().multiplier(q, keys, visible[None, None]).to(wide)
    if rounding == "operands" and is_vector:  # every call takes a number
        q, k, factor = _scaled_before(q, k, factor)
    products = (q @ k.mT).to(wide) if rounding == "logits" else q.to(wide) @ k.to(wide).mT
    weights = (products * factor).masked_fill(~visible, -torch.inf).softmax(-1).to(v.dtype)
    return weights @ v if rounding == "logits" else (weights.to(wide) @ v.to(wide)).to(q.dtype)


def _scaled_before(q: Tensor, k: Tensor, factor: Tensor) -> tuple[Tensor, Tensor, Tensor | float]:
    """Scale q [1, H, rows, D] and k in their dtype by their parts of a factor; also return the constant left."""
    if factor.shape[-1] == 1:  # one a row
        return (q * factor).to(q.dtype), k, 1.0
    # tau / (||q|| ||k||): both are made unit vectors
    norms = [x.to(factor.dtype).norm(dim=-1, keepdim=True) for x in (q, k)]
    tau = (factor * norms[0] * norms[1].mT).detach().amax()
    unit_q, unit_k = (
        torch.where(norm > 0, x / torch.where(norm > 0, norm, 1), 0).to(x.dtype)
        for x, norm in zip((q, k), norms, strict=True)
    )
    return unit_q, unit_k, tau


def judge(results: Results, exact: Results, eager: Results, dtype: torch.dtype, gradient_band: int = BAND) -> Verdict:
    """Hold every result to the tests' bound, and return the verdict with the largest error in bounds."""
    bands = {name: BAND if name == "out" else gradient_band for name in results}
    verdicts = (_judged(name, results[name], exact[name], eager[name], dtype, band) for name, band in bands.items())
    return max(verdicts, key=lambda verdict: verdict.bounds)


def _judged(name: str, result: Tensor, exact: Tensor, eager: Tensor, dtype: torch.dtype, band: int) -> Verdict:
    size = exact.abs().max().item() or 1.0
    bound = allowed_error(exact, eager, dtype, band=band) / size
    if result.shape != exact.shape:
        return Verdict(math.inf, bound, f"{name}: expected shape {tuple(exact.shape)}, got {tuple(result.shape)}")
    error = (result.double() - exact).abs().max().item() / size
    if error <= bound:
        return Verdict(error, bound)
    wrong = f"{name}: expected an error of at most {bound:.2e} of the largest value, got {error:.2e}"
    return Verdict(error, bound, wrong)


@dataclass(frozen=True)
class Sample:
    """A head of a case: the question, and the part of a result that answers it."""

    question: Question
    part: Callable[[Tensor], Tensor]


def checker(
    samples: Sequence[Sample], scaling: str, rounding: str, gradient_band: int = BAND
) -> Callable[[Results], Verdict]:
    """Return a function that judges results by samples, and returns the worst verdict."""

    def verdict(results: Results, sample: Sample) -> Verdict:
        question = sample.question
        parts = {name: sample.part(x).detach() for name, x in results.items()}
        exact, eager = question.exact(scaling), question.eager(scaling, rounding)
        return judge(parts, exact, eager, question.q.dtype, gradient_band)

    def check(results: Results) -> Verdict:
        return max((verdict(results, sample) for sample in samples), key=lambda one: one.bounds)

    return check
