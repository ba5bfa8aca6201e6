"""An attention call with derivatives of first and second order, as autograd functions.

With H = <d_out, J u> + <d_lse, J_lse u>, where J is the derivative of out towards the tensors x of a call and u their
tangent, each pass of a backend is a derivative of H, and so is the derivative of each:

    backward = dH / du,  tangent = dH / d(d_out, d_lse),  second = dH / dx and dH / du
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from torch.autograd.function import Function

from ..core.autograd import (
    apply_in_backward,
    apply_with_graph,
    differentiates_again,
    in_forward_mode,
    is_transformed,
    needs_graph,
    primal_of,
    refused,
    runs_eagerly,
    save,
    with_jvp,
)
from ..core.call import AttentionCall, ForwardResult
from ..core.terms import Gradients, Needs
from ..core.visibility import Visibility
from .operators import ARGUMENTS, GRADIENTS, TENSORS, call_of, flat, without_repeats
from .passes import (
    Saved,
    backward_pass,
    forward,
    forward_operator,
    second_and_tangent_pass,
    second_pass,
    tangent_pass,
)


def attention(call: AttentionCall) -> ForwardResult:
    """Run a call on its backend, "triton" or "sdpa"; out and lse have gradients towards q, k, v, scales and sinks.

    max_logit and entropy are None without aux.
    """
    given = call.q, call.k, call.v, *call.terms.tensors()
    has_graph, is_eager = needs_graph(*given), runs_eagerly(*given, call.visibility.key_lengths)
    if is_eager and not has_graph:
        results = forward(call, keep_rounding=False, has_graph=False)
        return ForwardResult(*results[: 4 if call.aux else 2])  # pyright: ignore[reportArgumentType]
    keep_rounding = call.v.dtype.itemsize == 2 and (has_graph or is_transformed())
    values = flat(call if is_eager else without_repeats(call))
    if not (is_eager or is_transformed() or in_forward_mode()):
        results = forward_operator(*values, keep_rounding)
    else:
        slots = [slot for slot, x in enumerate(values[:TENSORS]) if x is not None]
        tensors = [*map(values.__getitem__, slots)]
        visible = call.visibility if is_eager and slots[-1] < GRADIENTS else None
        rest = _Rest([None] * TENSORS + values[TENSORS:], slots, keep_rounding, visible)
        if is_eager:
            results = apply_with_graph(_Attention, *tensors, rest, call)
        else:
            results = (with_jvp(_Attention) if in_forward_mode() else _Attention).apply(*tensors, rest, None)
    return ForwardResult(*results[: 4 if call.aux else 2])


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

    def call(self, tensors: Iterable[Tensor | None]) -> AttentionCall:
        return call_of(self.whole(tensors), self.visible)

    def fields(self, by_slot: Sequence[Any], default: Any) -> list[Any]:
        """The entries, of one for each of the tensors, that belong to the fields of `Gradients`."""
        found = [default] * GRADIENTS
        for slot, x in zip(self.slots, by_slot, strict=False):
            if slot < GRADIENTS:
                found[slot] = x
        return found

    def by_slot(self, fields: Sequence[Any]) -> list[Any]:
        """The inverse of `fields`: None for a tensor that has no gradient."""
        return [fields[slot] if slot < GRADIENTS else None for slot in self.slots]

    def primals(self, tensors: Sequence[Tensor | None]) -> list[Tensor | None]:
        """The tensors without their tangents."""
        return [primal_of(x) if slot < GRADIENTS else x for slot, x in zip(self.slots, tensors, strict=True)]

    def halves(self, given: Sequence[Any]) -> tuple[Sequence[Tensor | None], Gradients]:
        """The tensors, and the tangents that come behind them."""
        count = len(self.slots)
        return given[:count], Gradients(*self.fields(given[count:], None))

    def needs_of_halves(self, needs: Sequence[bool]) -> tuple[Needs, Needs]:
        return Needs(*self.fields(needs, False)), Needs(*self.fields(needs[len(self.slots) :], False))


@dataclass(eq=False, slots=True)
class _Asked:
    """The gradients of a call that are asked for: `of_tensors` and, of its tangent, `of_tangents`."""

    rest: _Rest
    of_tensors: Needs
    of_tangents: Needs


class _Attention(Function):
    """The derivative of a call, whose inputs are its tensors, the `_Rest`, and where it runs eagerly the call."""

    generate_vmap_rule = True

    @staticmethod
    def forward(*inputs):
        *tensors, rest, call = inputs
        if call is None:
            return forward_operator(*rest.whole(tensors), rest.keep_rounding)
        return forward(call, rest.keep_rounding)

    @staticmethod
    def setup_context(ctx, inputs, output) -> None:
        *tensors, ctx.rest, _ = inputs
        out, lse, *others = output
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(*[x for x in others if x is not None])
        save(ctx, out, lse, others[-1], *tensors)

    @staticmethod
    def backward(ctx, d_out, d_lse, *none):
        (out, lse, rounding, *tensors), rest = ctx.saved_tensors, ctx.rest
        results = out, lse, rounding if rest.keep_rounding else None
        needs = Needs(*rest.fields(ctx.needs_input_grad, False))
        if differentiates_again():
            found = _gradients(rest, tensors, results, d_out, d_lse, needs)
        else:
            found = backward_pass(rest.call(tensors), results, d_out, d_lse, needs)
        return *rest.by_slot(found), None, None

    @staticmethod
    def tangent(ctx, *tangents):
        (out, lse, rounding, *tensors), rest = ctx.saved_tensors, ctx.rest
        results = out.detach(), lse.detach(), rounding if rest.keep_rounding else None  # they get tangents after this
        along = Gradients(*rest.fields(tangents, None))
        return *_tangents(rest, rest.primals(tensors), results, along), None, None, None


def _gradients(
    rest: _Rest,
    tensors: Sequence[Tensor | None],
    results: Saved,
    d_out: Tensor | None,
    d_lse: Tensor | None,
    needs: Needs,
) -> Gradients:
    """`backward_pass`, with derivatives of its own."""
    inputs = *tensors, *results, d_out, d_lse, _Asked(rest, needs, Needs())
    return _by_field(needs, iter(apply_in_backward(_Backward, *inputs)))


def _tangents(
    rest: _Rest, tensors: Sequence[Tensor | None], results: Saved, tangents: Gradients
) -> tuple[Tensor, Tensor]:
    """`tangent_pass`, likewise."""
    return apply_in_backward(_Tangent, *tensors, *rest.by_slot(tangents), *results, _Asked(rest, Needs(), Needs()))


def _second(
    rest: _Rest,
    tensors: Sequence[Tensor | None],
    results: Saved,
    tangents: Gradients,
    d_out: Tensor | None,
    d_lse: Tensor | None,
    needs: tuple[Needs, Needs],
) -> tuple[Gradients, Gradients]:
    """`second_pass`, with derivatives towards the tangents; others, third ones, raise where they are asked for."""
    if differentiates_again():
        of_tensors = rest.by_slot(rest.fields(tensors, None))
        *marked, d_out, d_lse = refused(_NO_THIRD, (*of_tensors, d_out, d_lse))
        tensors = [x if mark is None else mark for x, mark in zip(tensors, marked, strict=True)]
    inputs = *tensors, *rest.by_slot(tangents), *results, d_out, d_lse, _Asked(rest, *needs)
    found = iter(apply_in_backward(_Second, *inputs))
    return _by_field(needs[0], found), _by_field(needs[1], found)


def _by_field(needs: Needs, found: Iterator[Tensor | None]) -> Gradients:
    """The next of found for each need."""
    return Gradients(*[next(found) if need else None for need in needs])


class _Pass(Function):
    """A pass with derivatives of its own, whose inputs are tensors, and an `_Asked` behind them."""

    generate_vmap_rule = True

    @staticmethod
    def setup_context(ctx, inputs, output) -> None:
        *tensors, ctx.asked = inputs
        ctx.set_materialize_grads(False)
        save(ctx, *tensors)


class _Backward(_Pass):
    """The gradients that `needs` asks for, from a call's tensors, its results, and the gradients of these.

    Results are functions of the tensors: the derivatives towards the tensors are whole without others towards results.
    """

    @staticmethod
    def forward(*inputs):
        *tensors, out, lse, rounding, d_out, d_lse, asked = inputs
        found = backward_pass(asked.rest.call(tensors), (out, lse, rounding), d_out, d_lse, asked.of_tensors)
        return tuple([x for x in found if x is not None])

    @staticmethod
    def backward(ctx, *cotangents):
        *tensors, out, lse, rounding, d_out, d_lse = ctx.saved_tensors
        rest, results = ctx.asked.rest, (out, lse, rounding)
        tangents = _by_field(ctx.asked.of_tensors, iter(cotangents))
        needs = Needs(*rest.fields(ctx.needs_input_grad, False))
        d_tensors, d_d_out, d_d_lse = Gradients(), None, None
        is_along = any(ctx.needs_input_grad[len(tensors) :])
        if any(needs) and is_along and not differentiates_again():
            call = rest.call(tensors)
            d_tensors, (d_d_out, d_d_lse) = second_and_tangent_pass(call, results, tangents, d_out, d_lse, needs)
        else:
            if any(needs):
                d_tensors, _ = _second(rest, tensors, results, tangents, d_out, d_lse, (needs, Needs()))
            if is_along:
                d_d_out, d_d_lse = _tangents(rest, tensors, results, tangents)
        d_d_lse = None if d_lse is None else d_d_lse
        return *rest.by_slot(d_tensors), None, None, None, None if d_out is None else d_d_out, d_d_lse, None

    @staticmethod
    def tangent(ctx, *tangents):
        *tensors, out, lse, rounding, d_out, d_lse = ctx.saved_tensors
        rest, needs, results = ctx.asked.rest, ctx.asked.of_tensors, (out, lse, rounding)
        tensors, d_out, d_lse = rest.primals(tensors), primal_of(d_out), primal_of(d_lse)
        along, of_d_out, of_d_lse = Gradients(*rest.fields(tangents, None)), *tangents[len(tensors) + 3 : -1]
        found = []
        if any(x is not None for x in along):  # by symmetry: the second derivatives times a vector
            found.append(_second(rest, tensors, results, along, d_out, d_lse, (needs, Needs()))[0])
        if not (of_d_out is None and of_d_lse is None):
            found.append(_gradients(rest, tensors, results, of_d_out, of_d_lse, needs))
        by_field = zip(needs, *found, strict=True)
        return tuple([sum(some[1:], start=some[0]) if found else None for need, *some in by_field if need])


class _Tangent(_Pass):
    """The tangents of out and lse, from a call's tensors, their tangents, and its results."""

    @staticmethod
    def forward(*inputs):
        *given, out, lse, rounding, asked = inputs
        tensors, tangents = asked.rest.halves(given)
        return tangent_pass(asked.rest.call(tensors), (out, lse, rounding), tangents)

    @staticmethod
    def backward(ctx, d_out, d_lse):
        *given, out, lse, rounding = ctx.saved_tensors
        rest, results = ctx.asked.rest, (out, lse, rounding)
        (tensors, tangents), needs = rest.halves(given), rest.needs_of_halves(ctx.needs_input_grad)
        if any(needs[0]):
            found = _second(rest, tensors, results, tangents, d_out, d_lse, needs)
        else:
            found = Gradients(), _gradients(rest, tensors, results, d_out, d_lse, needs[1])
        return *rest.by_slot(found[0]), *rest.by_slot(found[1]), None, None, None, None

    @staticmethod
    def tangent(ctx, *tangents):
        *given, out, lse, rounding = ctx.saved_tensors
        rest = ctx.asked.rest
        (tensors, _), (of_tensors, along) = rest.halves(given), rest.halves(tangents)
        if any(x is not None for x in of_tensors):
            raise NotImplementedError(
                'tritonattn: forward mode over forward mode is not supported; backend="reference" has it, and forward'
                " mode over reverse mode, as of torch.func.hessian, has the same numbers"
            )
        return _tangents(rest, rest.primals(tensors), (out, lse, rounding), along)


_NO_THIRD = 'third derivatives are not supported; backend="reference" has them'


class _Second(_Pass):
    """The gradients of `_Tangent` that are asked for, towards the tensors, then towards their tangents."""

    @staticmethod
    def forward(*inputs):
        *given, out, lse, rounding, d_out, d_lse, asked = inputs
        tensors, tangents = asked.rest.halves(given)
        needs = asked.of_tensors, asked.of_tangents
        found = second_pass(asked.rest.call(tensors), (out, lse, rounding), tangents, d_out, d_lse, needs)
        return tuple([x for some in found for x in some if x is not None])

    @staticmethod
    def backward(ctx, *cotangents):
        """The second derivatives are symmetric: those towards the tangents, from a tangent in the cotangents' place."""
        *given, out, lse, rounding, d_out, d_lse = ctx.saved_tensors
        rest, results = ctx.asked.rest, (out, lse, rounding)
        along = _by_field(ctx.asked.of_tensors, iter(cotangents))
        _, needs = rest.needs_of_halves(ctx.needs_input_grad)
        tensors, _ = rest.halves(given)
        found = Gradients()
        if any(x is not None for x in along):
            found, _ = _second(rest, tensors, results, along, d_out, d_lse, (needs, Needs()))
        zeros = [None if x is None else x.new_zeros(()).expand_as(x) for x in (*tensors, d_out, d_lse)]  # raise
        of_tensors = rest.by_slot(rest.fields(zeros, None))
        return *of_tensors, *rest.by_slot(found), None, None, None, *zeros[-2:], None

    @staticmethod
    def tangent(ctx, *tangents):
        *given, out, lse, rounding, d_out, d_lse = ctx.saved_tensors
        asked, rest = ctx.asked, ctx.asked.rest
        (tensors, _), (_, along) = rest.halves(given), rest.halves(tangents)
        of_results = (out, lse, rounding), along, primal_of(d_out), primal_of(d_lse)
        found, _ = _second(rest, rest.primals(tensors), *of_results, (asked.of_tensors, Needs()))
        return *[x for x in found if x is not None], *[None] * sum(asked.of_tangents)


def _keep_arguments(ctx, inputs, output) -> None:
    *values, keep_rounding = inputs
    rest = _Rest([None] * TENSORS + values[TENSORS:], range(TENSORS), keep_rounding)
    _Attention.setup_context(ctx, (*values[:TENSORS], rest, None), output)


def _of_operator(ctx, *gradients):
    *found, _, _ = _Attention.backward(ctx, *gradients)
    return *found, *[None] * (len(ARGUMENTS) + 1 - TENSORS)


forward_operator.register_autograd(_of_operator, setup_context=_keep_arguments)
