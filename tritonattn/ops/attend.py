"""An attention call and the statistics of its keys, with gradients, as autograd functions and operators."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import Function

from ..backends import BACKENDS
from ..core.autograd import (
    apply_with_graph,
    first_order,
    is_transformed,
    needs_graph,
    runs_eagerly,
    without_autocast,
)
from ..core.call import AttentionCall, ForwardResult
from ..core.terms import Gradients, Needs
from ..core.visibility import Visibility
from .operators import (
    ARGUMENTS,
    GRADIENTS,
    SCHEMA,
    TENSORS,
    call_of,
    flat,
    operator,
    vmap_of_call,
    without_repeats,
)


def attention(call: AttentionCall) -> ForwardResult:
    """Run a call on its backend, "triton" or "sdpa"; out and lse have gradients towards q, k, v, scales and sinks.

    max_logit and entropy are None without aux.
    """
    given = call.tensors()
    has_graph, is_eager = needs_graph(*given), runs_eagerly(*given, call.visibility.key_lengths)
    if is_eager and not has_graph:
        return _forward(call, has_graph=False)
    keep_rounding = call.v.dtype.itemsize == 2 and (has_graph or is_transformed())
    values = flat(call if is_eager else without_repeats(call))
    if not (is_eager or is_transformed()):
        results = _forward_operator(*values, keep_rounding)
    else:
        slots = [slot for slot, x in enumerate(values[:TENSORS]) if x is not None]
        tensors = [values[slot] for slot in slots]
        visible = call.visibility if is_eager and slots[-1] < GRADIENTS else None
        rest = _Rest([None] * TENSORS + values[TENSORS:], slots, keep_rounding, visible)
        if is_eager:
            results = apply_with_graph(_Attention, *tensors, rest, call)
        else:
            results = _Attention.apply(*tensors, rest, None)
    return ForwardResult(*results[: 4 if call.aux else 2])


def forward_pass(call: AttentionCall, keep_rounding: bool) -> tuple[Tensor, ...]:
    """out, lse, max_logit, entropy and rounding, without a graph: tensors of size 0 for those not asked for."""
    if runs_eagerly(*call.tensors()):
        return _filled(_forward_kept(call, keep_rounding))
    return _forward_operator(*flat(call), keep_rounding)


def backward_pass(
    call: AttentionCall,
    results: tuple[Tensor, Tensor, Tensor | None],
    d_out: Tensor | None,
    d_lse: Tensor | None,
    needs: Needs,
) -> Gradients:
    """Gradients of a call whose `forward_pass` returned `results`: out, lse, and rounding where it was kept."""
    if runs_eagerly(call.q, call.k, call.v, d_out, d_lse):
        return _backward(call, results, d_out, d_lse, needs)
    filled = _backward_operator(*flat(call), *results, d_out, d_lse, list(needs))
    return Gradients(*(gradient if need else None for gradient, need in zip(filled, needs, strict=True)))


def _forward(call: AttentionCall, rounding: Tensor | None = None, *, has_graph: bool) -> ForwardResult:
    """Run a call on its backend. With a graph, forward and backward must multiply in the same tiles."""
    visible, backend = call.visibility, BACKENDS[call.backend]
    is_cache = call.cached and visible.sequences is None
    if call.block_table is not None and not (backend.reads_pages and (is_cache or call.k.shape[0] > 0)):
        call = call.gathered()
    if is_cache:
        if visible.invariant:
            call = call.by_ranges()
    elif call.q.numel() == 0 or call.k.numel() == 0:
        out, lse, max_logit, entropy, _ = _allocate_forward(call, keep_rounding=False)
        rows = (out.zero_(), lse.fill_(-torch.inf), max_logit.fill_(-torch.inf), entropy.zero_())
        return ForwardResult(*rows[: 4 if call.aux else 2])
    elif visible.invariant and (first := visible.first_keys()) is not None:
        call = call.from_keys(first)
    return backend.forward(call, rounding, has_graph)


def _forward_kept(call: AttentionCall, keep_rounding: bool) -> tuple[Tensor | None, ...]:
    """The results of `_forward`, and rounding: None for those not asked for."""
    q, v = call.q, call.v
    rounding = v.new_empty((*q.shape[:3], v.shape[3]), dtype=torch.int8) if keep_rounding else None
    has_graph = keep_rounding or v.dtype.itemsize > 2  # nothing here tells which wider ones have one
    return (*_forward(call, rounding, has_graph=has_graph), rounding)


def _backward(
    call: AttentionCall,
    results: tuple[Tensor, Tensor, Tensor | None],
    d_out: Tensor | None,
    d_lse: Tensor | None,
    needs: Needs,
) -> Gradients:
    out, lse, rounding = results
    if call.q.numel() == 0 or call.k.numel() == 0:
        pairs: Any = zip(call.tensors(), needs, strict=True)
        return Gradients(*(x.new_zeros(x.shape) if need else None for x, need in pairs))
    d_out = torch.zeros_like(out) if d_out is None else d_out.to(out.dtype).resolve_neg()  # a compiler may widen it
    d_lse = None if d_lse is None else d_lse.resolve_neg()
    first = call.visibility.first_keys() if call.visibility.invariant else None
    if first is not None:
        call = call.from_keys(first)
    found = BACKENDS[call.backend].backward(call, (out, lse, rounding), d_out, d_lse, needs)
    return found if first is None else found.rolled(call.visibility.k_len - first)


def _allocate_forward(call: AttentionCall, keep_rounding: bool) -> tuple[Tensor, ...]:
    rows, out_shape = call.q.shape[:3], (*call.q.shape[:3], call.v.shape[3])
    lse = call.q.new_empty(rows, dtype=torch.promote_types(call.q.dtype, torch.float32))
    max_logit, entropy = (lse.new_empty(rows if call.aux else (0,)) for _ in range(2))
    rounding = call.v.new_empty(out_shape, dtype=torch.int8) if keep_rounding else lse.new_empty(0)
    return call.v.new_empty(out_shape), lse, max_logit, entropy, rounding


def _filled(results: Sequence[Tensor | None]) -> tuple[Tensor, ...]:
    """Replace None by a tensor of size 0: an operator returns tensors, laid out as its fake says."""
    _, lse, *_ = results
    assert lse is not None
    return tuple(lse.new_empty(0) if result is None else result.contiguous() for result in results)


@operator(
    "forward",
    f"{SCHEMA}, bool keep_rounding",
    "(Tensor out, Tensor lse, Tensor max_logit, Tensor entropy, Tensor rounding)",
)
def _forward_operator(*arguments):
    *arguments, keep_rounding = arguments
    with without_autocast(arguments[0]):
        return _filled(_forward_kept(call_of(arguments), keep_rounding))


@_forward_operator.register_fake
def _(*arguments):
    *arguments, keep_rounding = arguments
    return _allocate_forward(call_of(arguments), keep_rounding)


@operator(
    "backward",
    f"{SCHEMA}, Tensor out, Tensor lse, Tensor? rounding, Tensor? d_out, Tensor? d_lse, bool[] needs",
    f"({', '.join(f'Tensor d_{name}' for name in Gradients._fields)})",
)
def _backward_operator(*arguments):
    *arguments, out, lse, rounding, d_out, d_lse, needs = arguments
    call = call_of(arguments)
    found = _backward(call, (out, lse, rounding), d_out, d_lse, Needs(*needs))
    return tuple(call.q.new_empty(0) if x is None else x.contiguous() for x in found)


@_backward_operator.register_fake
def _(*arguments):
    pairs = zip(arguments[:GRADIENTS], arguments[-1], strict=True)
    return tuple(x.new_empty(x.shape) if need else arguments[0].new_empty(0) for x, need in pairs)


@dataclass(eq=False, slots=True)  # not a tuple, which torch.func would take apart
class _Rest:
    """The parts of a call besides its tensors.

    values    the arguments of the operator, with None for tensors
    slots     the numbers of the tensors among them
    visible   the call's, where it holds no tensor: what it has kept serves the backward too
    """

    values: list[Any]
    slots: Sequence[int]
    keep_rounding: bool
    visible: Visibility | None = None

    def whole(self, tensors: Iterable[Tensor | None]) -> list[Any]:
        """All arguments."""
        values = [*self.values]
        for slot, x in zip(self.slots, tensors, strict=True):
            values[slot] = x
        return values


class _Attention(Function):
    """The one derivative of a call, whose inputs are its tensors, the `_Rest`, and where it runs eagerly the call."""

    generate_vmap_rule = True

    @staticmethod
    def forward(*inputs):
        *tensors, rest, call = inputs
        if call is None:
            return _forward_operator(*rest.whole(tensors), rest.keep_rounding)
        return _forward_kept(call, rest.keep_rounding)

    @staticmethod
    def setup_context(ctx, inputs, output) -> None:
        *tensors, ctx.rest, _ = inputs
        out, lse, *others = output
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(*[x for x in others if x is not None])
        ctx.save_for_backward(out, lse, others[-1], *tensors)

    @staticmethod
    @first_order
    def backward(ctx, saved, d_out, d_lse, *none):
        (out, lse, rounding, *tensors), rest = saved, ctx.rest
        needs, slots = [False] * GRADIENTS, rest.slots
        for slot, need in zip(slots, ctx.needs_input_grad, strict=False):
            if need:
                needs[slot] = True
        results = out, lse, rounding if rest.keep_rounding else None
        call = call_of(rest.whole(tensors), rest.visible)
        found = backward_pass(call, results, d_out, d_lse, Needs(*needs))
        return *[found[slot] if slot < GRADIENTS else None for slot in slots], None, None


def _keep_arguments(ctx, inputs, output) -> None:
    *values, keep_rounding = inputs
    rest = _Rest([None] * TENSORS + values[TENSORS:], range(TENSORS), keep_rounding)
    _Attention.setup_context(ctx, (*values[:TENSORS], rest, None), output)


def _of_operator(ctx, *gradients):
    *found, _, _ = _Attention.backward(ctx, *gradients)
    return *found, *[None] * (len(ARGUMENTS) + 1 - TENSORS)


_forward_operator.register_autograd(_of_operator, setup_context=_keep_arguments)
_forward_operator.register_vmap(functools.partial(vmap_of_call, _forward_operator))
_backward_operator.register_vmap(functools.partial(vmap_of_call, _backward_operator))
