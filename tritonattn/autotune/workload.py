"""Calls in which one kernel does the work, and their check against the reference."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace

import torch
from torch import Tensor

from ..backends import triton as triton_backend
from ..backends.protocol import SecondOrder
from ..backends.triton.operands import Operands
from ..calls.formulas import by_formulas
from ..core.call import AttentionCall, ForwardResult, Request, RowGradients
from ..core.terms import ADDENDS, SINKS, TENSORS, TERMS, Gradients, Needs
from ..scaling import Given
from ..tuning.calls import Size
from ..tuning.config import SECOND_KERNELS, Problem, holds_keys
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
    """One call of a kernel; a backward or a tangent takes what its forward left, which is computed once.

    Tangents are those of all tensors, and gradients of a tangent reach the tangents too.
    """

    def __init__(self, kernel: str, operands: Operands) -> None:
        self.kernel, self.problem = kernel, operands.problem
        self.call = operands.decode() if kernel == "decode" else operands.attention()
        self._needs = _needs(kernel, self.problem)
        self._forward: tuple[Tensor, Tensor, Tensor | None] | None = None
        if any(self._needs):
            shape = (*self.call.q.shape[:3], self.problem.value_dim)
            self._d_out = operands.operand(*shape)
            self._d_lse = operands.normal(*shape[:3]) if self.problem.aux else None
        if kernel in SECOND_KERNELS:
            self._tangents = Gradients(*(None if x is None else operands.like(x) for x in self.call.tensors()))

    def __call__(self) -> tuple[Tensor, ...]:
        call, aux = self.call, self.problem.aux
        if self.kernel == "decode":
            return _results(triton_backend.decode(call, aux), aux)
        if self.kernel == "forward":
            return _results(triton_backend.forward(call, aux, self._rounding()), aux)
        if self._forward is None:
            rounding = self._rounding()
            out, lse, *_ = triton_backend.forward(call, False, rounding)
            self._forward = out, lse, rounding
        out, lse, rounding = saved = self._forward
        if self.kernel == "tangent":
            return triton_backend.tangent(call, saved, self._tangents)
        if self.kernel in SECOND_KERNELS:
            asked = SecondOrder(self._tangents, self._d_out, self._d_lse, self._needs, self._needs)
            *found, _ = triton_backend.second(call, saved, asked)
            return tuple(x for gradients in found for x in gradients if x is not None)
        gradients = triton_backend.backward(
            call, out, lse, self._d_out, RowGradients(self._d_lse), self._needs, rounding
        )
        return tuple(x for x in gradients if x is not None)

    def reference(self, dtype: torch.dtype) -> list[Tensor]:
        """Compute the results eagerly in a dtype."""
        call = self.call.gathered()
        if self.kernel == "decode":
            call = call.by_ranges()
        leaves = _leaves(call.tensors(), dtype)
        wanted = [leaves[name] for name, needed in self._needs._asdict().items() if needed and name in leaves]
        if self.kernel in SECOND_KERNELS:
            along = _leaves(self._tangents, dtype)
            wanted += [along[name] for name, needed in self._needs._asdict().items() if needed and name in along]
            outputs = _tangents_of(call, leaves, along)
            if self.kernel == "tangent":
                return [x.detach() for x in outputs]
        else:
            found = _by_formulas(call, leaves)
            if not wanted:
                return [x.detach() for x in _results(found, self.problem.aux)]
            outputs = [found.out, found.lse]
        gradients = [self._d_out.to(outputs[0])]
        if self._d_lse is not None:
            gradients.append(self._d_lse.to(outputs[1]))
        return list(torch.autograd.grad(outputs[: len(gradients)], wanted, gradients))

    def _rounding(self) -> Tensor | None:
        """Memory for the part that a training call's output loses when it is rounded."""
        shape = (*self.call.q.shape[:3], self.problem.value_dim)
        return self.call.q.new_empty(shape, dtype=torch.int8) if self.problem.rounding else None


def _needs(kernel: str, problem: Problem) -> Needs:
    """Say which gradients are computed; the row terms, a small part of the work, come with either kernel.

    Gradients of biases take both kernels.
    """
    if kernel.startswith("grad_query"):
        of_factor = problem.query_scale if kernel in SECOND_KERNELS else problem.query_scale_grad
        return Needs(q=True, query_scale=of_factor, **{name: getattr(problem, name) for name in SINKS})
    if holds_keys(kernel):
        biases = {name: getattr(problem, name) for name in ADDENDS}
        return Needs(k=True, v=True, key_scale=problem.key_scale, **biases)
    return Needs()


def _leaves(tensors: Iterable[Tensor | None], dtype: torch.dtype) -> dict[str, Tensor]:
    """The tensors of a call, or their tangents, that are there: q, k and v in a dtype, terms at least in fp32."""
    wide, found = torch.promote_types(dtype, torch.float32), {}
    for name, x in zip(Gradients._fields, tensors, strict=True):
        if x is not None:
            found[name] = x.detach().to(dtype if name in "qkv" else wide).requires_grad_()
    return found


def _by_formulas(call: AttentionCall, tensors: dict[str, Tensor]) -> ForwardResult:
    """The results of a call, with these tensors, by dense formulas; its grouped terms as a user's, a row per head."""
    grouped = {term.name for term in TERMS[TENSORS] if "G" in term.axes}
    terms = {name: x.flatten(1, 2) if name in grouped else x for name, x in tensors.items() if name not in "qkv"}
    logits = call.terms._replace(**terms)
    given = Given(logits.scale, logits.query_scale, logits.key_scale)
    request = Request(tensors["q"], tensors["k"], tensors["v"], call.visibility, logits, given)
    return by_formulas(request, call.dropout)


def _tangents_of(call: AttentionCall, tensors: dict[str, Tensor], along: dict[str, Tensor]) -> list[Tensor]:
    """The tangents of out and of lse, which is 0 for a row without keys."""

    def dense(*given: Tensor) -> tuple[Tensor, Tensor]:
        found = _by_formulas(call, dict(zip(tensors, given, strict=True)))
        return found.out, found.lse

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".torch.jit.script")  # of the first jvp
        (_, lse), (out, of_lse), *_ = torch.func.jvp(dense, tuple(tensors.values()), tuple(along.values()))
    return [out, torch.where(lse == -torch.inf, 0, of_lse)]


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
