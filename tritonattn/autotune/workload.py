"""Calls in which one kernel does the work, and their check against the reference."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import torch
from torch import Tensor

from ..backends import triton as triton_backend
from ..backends.triton.operands import Operands
from ..calls.formulas import by_formulas
from ..core.call import ForwardResult, Request
from ..core.terms import ADDENDS, SINKS, TENSORS, TERMS, Needs
from ..scaling import Given
from ..tuning.calls import Size
from ..tuning.config import Problem
from ..tuning.table import Key

_COPIES = 3
_CHECKED_LOGITS = 2**24  # of a call that the reference computes, whose dense logits are in fp64
_CHECKED_HEADS = 2  # key heads, and batch entries, of a check that is cut


def typical_size(key: Key) -> Size:
    """Choose the size that a key is timed with: about as many tokens for every length."""
    if key.kernel == "decode":
        length = 1024 if key.lengths == "short" else 16384
        return Size(2**18 // length, 32, 1, length, group=4)
    length = 512 if key.lengths == "short" else 4096
    return Size(2**14 // length, 16, length, length)


def checked_size(size: Size) -> Size:
    """Cut a size to what the reference computes: batch and heads first, then lengths; its group and pages stay."""
    if size.logits <= _CHECKED_LOGITS:
        return size
    batch, heads = min(size.batch, _CHECKED_HEADS), min(size.kv_heads, _CHECKED_HEADS) * size.group
    q_len, k_len = size.q_len, size.k_len
    while batch * heads * q_len * k_len > _CHECKED_LOGITS and max(q_len, k_len) > 1:
        q_len, k_len = (-(-x // 2) if 2 * x > max(q_len, k_len) else x for x in (q_len, k_len))
    totals = {}
    if size.q_total:
        totals = {
            "q_total": _cut_total(size.q_total, size.q_len, q_len, size.batch, batch),
            "k_total": _cut_total(size.k_total, size.k_len, k_len, size.batch, batch),
        }
    return replace(size, batch=batch, heads=heads, q_len=q_len, k_len=k_len, **totals)


def _cut_total(total: int, longest: int, cut: int, sequences: int, left: int) -> int:
    """The tokens of fewer and shorter sequences: the longest, and others with the share of it that they had."""
    return cut + (total - longest) * cut * (left - 1) // (longest * max(sequences - 1, 1))


class Workload:
    """A kernel on random operands of a problem; several copies of them, so that rounds find cold caches."""

    def __init__(self, kernel: str, problem: Problem, size: Size, device: torch.device, copies: int = _COPIES) -> None:
        self.kernel, self.problem, self.size, self.device = kernel, problem, size, device
        self._copies = [_Copy(kernel, Operands(problem, size, device, seed)) for seed in range(copies)]

    def __call__(self, number: int) -> tuple[Tensor, ...]:
        """Launch with the next copy in the config in use, and return the kernel's results."""
        return self._copies[number % len(self._copies)]()

    def error(self) -> str | None:
        """Say what is wrong with the results, or return None.

        No result may be NaN. A call of `checked_size` is compared with the reference, which drops the same
        probabilities: dropout is a function of the position.
        """
        size = checked_size(self.size)
        checked = self if size == self.size else Workload(self.kernel, self.problem, size, self.device, copies=1)
        with _poisoned_memory():
            found, compared = self(0), checked(0)
        for number, result in enumerate(found):
            if result.isnan().any():
                return f"result {number}: expected numbers, got nan"
        return checked._difference(compared)

    def _difference(self, found: tuple[Tensor, ...]) -> str | None:
        exact, eager = (self._copies[0].reference(dtype) for dtype in (torch.float64, self.problem.dtype))
        for number, (result, wanted, rounded) in enumerate(zip(found, exact, eager, strict=True)):
            band = torch.finfo(self.problem.dtype).eps
            finite = wanted.isfinite()  # lse of a row without keys is -inf
            wanted, rounded, result = (torch.where(finite, x.double(), 0) for x in (wanted, rounded, result))
            allowed = 2 * (rounded - wanted).abs().max() + band * wanted.abs().max()
            error = (result - wanted).abs().max()
            if not error <= allowed:  # NaN too
                return f"result {number}: expected an error of at most {allowed:.2e}, got {error:.2e}"
        return None


class _Copy:
    """One call of a kernel; a backward takes what its forward left, which is computed once."""

    def __init__(self, kernel: str, operands: Operands) -> None:
        self.kernel, self.problem = kernel, operands.problem
        self.call = operands.decode() if kernel == "decode" else operands.attention()
        self._needs = _needs(kernel, self.problem)
        if any(self._needs):
            shape = (*self.call.q.shape[:3], self.problem.value_dim)
            self._d_out = operands.operand(*shape)
            self._d_lse = operands.normal(*shape[:3]) if self.problem.aux else None
            self._forward: tuple[ForwardResult, Tensor | None] | None = None

    def __call__(self) -> tuple[Tensor, ...]:
        call, aux = self.call, self.problem.aux
        if self.kernel == "decode":
            return _results(triton_backend.decode(call, aux), aux)
        if not any(self._needs):
            return _results(triton_backend.forward(call, aux, self._rounding()), aux)
        if self._forward is None:
            rounding = self._rounding()
            self._forward = triton_backend.forward(call, False, rounding), rounding
        (out, lse, *_), rounding = self._forward
        gradients = triton_backend.backward(call, out, lse, self._d_out, self._d_lse, self._needs, rounding)
        return tuple(x for x in gradients if x is not None)

    def reference(self, dtype: torch.dtype) -> list[Tensor]:
        """Compute the results eagerly in a dtype."""
        call = self.call.gathered()
        if self.kernel == "decode":
            call = call.by_ranges()
        wide = torch.promote_types(dtype, torch.float32)
        q, k, v = (x.to(dtype).requires_grad_() for x in (call.q, call.k, call.v))
        terms = [None if x is None else x.to(wide).requires_grad_() for x in call.terms.tensors()]
        grouped = ((term.name, x, "G" in term.axes) for term, x in zip(TERMS[TENSORS], terms, strict=True))
        # A row per head, as in a user's call.
        logits = call.terms._replace(**{name: x.flatten(1, 2) if x is not None and g else x for name, x, g in grouped})
        given = Given(logits.scale, logits.query_scale, logits.key_scale)
        found = by_formulas(Request(q, k, v, call.visibility, logits, given), call.dropout)
        leaves = zip((q, k, v, *terms), self._needs, strict=True)
        wanted = [x for x, needed in leaves if x is not None and needed]
        if not wanted:
            return [x.detach() for x in _results(found, self.problem.aux)]
        outputs, gradients = [found.out], [self._d_out.to(dtype)]
        if self._d_lse is not None:
            outputs, gradients = [*outputs, found.lse], [*gradients, self._d_lse.to(wide)]
        return list(torch.autograd.grad(outputs, wanted, gradients))

    def _rounding(self) -> Tensor | None:
        """Memory for the part that a training call's output loses when it is rounded."""
        shape = (*self.call.q.shape[:3], self.problem.value_dim)
        return self.call.q.new_empty(shape, dtype=torch.int8) if self.problem.rounding else None


def _needs(kernel: str, problem: Problem) -> Needs:
    """Say which gradients are computed; the row terms, a small part of the work, come with either kernel.

    Gradients of biases take both kernels.
    """
    if kernel == "grad_query":
        return Needs(q=True, query_scale=problem.query_scale_grad, **{name: getattr(problem, name) for name in SINKS})
    if kernel == "grad_key_value":
        biases = {name: getattr(problem, name) for name in ADDENDS}
        return Needs(k=True, v=True, key_scale=problem.key_scale, **biases)
    return Needs()


def _results(found: ForwardResult, aux: bool) -> tuple[Tensor, ...]:
    return tuple(x for x in found if x is not None) if aux else (found.out,)


@contextmanager
def _poisoned_memory() -> Iterator[None]:
    """Fill fresh memory with NaN inside the context, so that a kernel that skips a result shows."""
    before = torch.get_deterministic_debug_mode()
    torch.set_deterministic_debug_mode("warn")  # with torch.utils.deterministic.fill_uninitialized_memory, its default
    try:
        yield
    finally:
        torch.set_deterministic_debug_mode(before)
