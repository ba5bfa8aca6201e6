"""Results held to float64: the errors that an eager computation with the same roundings makes set the bound."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

import tritonattn
from tests.support.bound import allowed_error
from tritonattn.scaling import Scales
from tritonattn.statistics import Statistics
from tritonattn.visibility import Visibility

from .contest import Results, Verdict

# Logits of a head that are in memory at once, in fp64 and several times over.
_LOGITS = 2**23

# What an eager computation rounds to the operands' dtype beside P, and so what a contestant may lose.
#   "P"           nothing: logits and scales are fp32
#   "operands"    q and k times their scales: the recipe of those who scale before they call
#   "logits"      the product of q and k
ROUNDINGS = ("P", "operands", "logits")


@dataclass(frozen=True)
class Question:
    """One head's attention: q [1, H, Sq, D], k and v [1, 1, Sk, D], d_out like q or None for no gradients."""

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
        """In float64, or in the operands' dtype with a rounding of ROUNDINGS."""
        if (scaling, rounding) not in self._answers:
            dtype = torch.float64 if rounding is None else self.q.dtype
            leaves = [x.detach().to(dtype).requires_grad_(self.d_out is not None) for x in (self.q, self.k, self.v)]
            self._answers[scaling, rounding] = _by_rows(self, leaves, scaling, rounding)
        return self._answers[scaling, rounding]


def _by_rows(question: Question, leaves: list[Tensor], scaling: str, rounding: str | None) -> Results:
    """out and gradients from blocks of rows, so that memory does not grow with Sq Sk."""
    q, k, v = leaves
    operands, factor = leaves, scaling
    if rounding == "operands":
        operands, factor = _scaled_before(q, k, v, scaling, question.causal)
    parts = [x.detach().requires_grad_(question.d_out is not None) for x in operands]
    wide = torch.promote_types(q.dtype, torch.float32)
    sums = [torch.zeros_like(x, dtype=wide) for x in parts]
    outs = []
    block = max(1, _LOGITS // (k.shape[2] * q.shape[1]))
    for first in range(0, q.shape[2], block):
        rows = slice(first, min(first + block, q.shape[2]))
        out = _attend(parts, rows, factor, question.causal, rounding)
        outs.append(out.detach())
        if question.d_out is not None:
            given = question.d_out[:, :, rows].to(out.dtype)
            for total, part in zip(sums, torch.autograd.grad(out, parts, given), strict=True):
                total += part
    results = {"out": torch.cat(outs, dim=2)}
    if question.d_out is None:
        return results
    found = [total.to(x.dtype) for total, x in zip(sums, parts, strict=True)]
    if operands is not leaves:
        found = torch.autograd.grad(operands, leaves, found)
    return results | {f"gradient of {name}": x for name, x in zip("qkv", found, strict=True)}


def _attend(parts: list[Tensor], rows: slice, factor: str | float, causal: bool, rounding: str | None) -> Tensor:
    """Some rows of the reference, which see the keys that they see in the whole."""
    q, k, v = parts
    offset = k.shape[2] - q.shape[2]
    hi = torch.arange(rows.start, rows.stop, device=q.device) + offset + 1 if causal else None
    block = q[:, :, rows]
    if rounding == "logits":
        return _attend_rounding_logits(block, k, v, factor, hi)
    ranges = None
    if hi is not None:
        hi = hi.clamp(min=0)
        ranges = torch.stack([torch.zeros_like(hi), hi], dim=-1)[None].int()
    return tritonattn.attention(block, k, v, scaling=factor, key_ranges=ranges, backend="reference")


def _attend_rounding_logits(q: Tensor, k: Tensor, v: Tensor, scaling: str, hi: Tensor | None) -> Tensor:
    """Eager attention in the dtype of its operands, of rows that see the keys j < hi; softmax in fp32."""
    visible = torch.ones(1, 1, q.shape[2], k.shape[2], dtype=torch.bool, device=q.device)
    if hi is not None:
        visible = visible & (torch.arange(k.shape[2], device=q.device) < hi[:, None])
    multiplier = tritonattn.SCALINGS[scaling]().multiplier(q, k.expand(-1, q.shape[1], -1, -1), visible)
    logits = (q @ k.mT).float() * multiplier
    return logits.float().masked_fill(~visible, -torch.inf).softmax(-1).to(v.dtype) @ v


def _scaled_before(q: Tensor, k: Tensor, v: Tensor, scaling: str, causal: bool) -> tuple[list[Tensor], float]:
    """q, k times the scales of a mode in their own dtype, v, and the constant that is left."""
    scales = mode_scales(q, k, scaling, causal)

    def scaled(x: Tensor, scale: Tensor | None) -> Tensor:
        return x.clone() if scale is None else (x * scale.float()[..., None]).to(x.dtype)

    return [scaled(q, scales.query), scaled(k, scales.key), v.clone()], scales.constant


def mode_scales(q: Tensor, k: Tensor, scaling: str, causal: bool) -> Scales:
    """What a mode gives the kernels."""
    visibility = Visibility.of(q, k, causal=causal)
    return tritonattn.SCALINGS[scaling]().scales(q, k, visibility, Statistics(k, visibility))


def judge(results: Results, exact: Results, eager: Results, dtype: torch.dtype) -> Verdict:
    """The tests' bound on every result; the verdict on the one that passes it by most, or comes closest to it."""
    verdicts = (_judged(name, result, exact[name], eager[name], dtype) for name, result in results.items())
    return max(verdicts, key=lambda verdict: verdict.bounds)


def _judged(name: str, result: Tensor, exact: Tensor, eager: Tensor, dtype: torch.dtype) -> Verdict:
    size = exact.abs().max().item() or 1.0
    bound = allowed_error(exact, eager, dtype) / size
    if result.shape != exact.shape:
        return Verdict(math.inf, bound, f"{name}: expected shape {tuple(exact.shape)}, got {tuple(result.shape)}")
    error = (result.double() - exact).abs().max().item() / size
    if error <= bound:
        return Verdict(error, bound)
    wrong = f"{name}: expected an error of at most {bound:.2e} of the largest value, got {error:.2e}"
    return Verdict(error, bound, wrong)


@dataclass(frozen=True)
class Sample:
    """A head of a case: what is asked of it, and where it lies in a result."""

    question: Question
    part: Callable[[Tensor], Tensor]


def checker(samples: Sequence[Sample], scaling: str, rounding: str) -> Callable[[Results], Verdict]:
    """Judges results by samples of them; the verdict on the worst."""

    def verdict(results: Results, sample: Sample) -> Verdict:
        question = sample.question
        parts = {name: sample.part(x).detach() for name, x in results.items()}
        return judge(parts, question.exact(scaling), question.eager(scaling, rounding), question.q.dtype)

    def check(results: Results) -> Verdict:
        return max((verdict(results, sample) for sample in samples), key=lambda one: one.bounds)

    return check
