"""An attention call with derivatives of first and second order, as autograd functions.

With H = <d_out, J u> + <d_lse, J_lse u>, where J is the derivative of out towards the tensors x of a call and u their
tangent, each pass of a backend is a derivative of H, and so is the derivative of each:

    backward = dH / du,  tangent = dH / d(d_out, d_lse),  second = dH / dx and dH / du
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
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
from ..core.call import AttentionCall, ForwardResult, RowGradients
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
    """Run a call on its backend, "triton" or "sdpa"; the results have gradients towards its tensors.

    max_logit and entropy are None without aux. They have no derivatives beyond the first.
    """
    given = call.q, call.k, call.v, *call.terms.tensors()
    has_graph = not call.cached and needs_graph(*given)
    is_eager = runs_eagerly(*given, call.visibility.key_lengths)
    if is_eager and not has_graph:
        results = forward(call, keep_rounding=False, has_graph=False)
        return ForwardResult(*results[: 4 if call.aux else 2])  # pyright: ignore[reportArgumentType]
    keep_rounding = call.v.dtype.itemsize == 2 and (has_graph or is_transformed())
    values = flat(call if is_eager else without_repeats(call))
    if not (is_eager or is_transformed() or in_forward_mode()):
        results = forward_operator(*values, keep_rounding)
    else:
        visible = call.visibility if is_eager and call.visibility.depends_on_sizes_only else None
        rest = _Rest(values[TENSORS:], keep_rounding, visible)
        if is_eager:
            results = apply_with_graph(_Attention, *values[:TENSORS], rest, call)
        else:
            results = (with_jvp(_Attention) if in_forward_mode() else _Attention).apply(*values[:TENSORS], rest, None)
    return ForwardResult(*results[: 4 if call.aux else 2])


# The first inputs of a function are the tensors of a call in the order of `ARGUMENTS`, or None where it has none: first
# GRADIENTS that may have a gradient, then others, whose gradients are these.
_OF_OTHERS = [None] * (TENSORS - GRADIENTS)


@dataclass(eq=False, slots=True)  # not a tuple, which torch.func would take apart
class _Rest:
    """The parts of a call besides its tensors.

    values    the arguments of the operator behind the tensors
    visible   the call's, where it holds no tensor: what it has kept serves the backward too
    """

    values: list[Any]
    keep_rounding: bool
    visible: Visibility | None = None

    def call(self, tensors: Sequence[Tensor | None]) -> AttentionCall:
        return call_of([*tensors, *self.values], self.visible)


def _primals(tensors: Sequence[Tensor | None]) -> list[Tensor | None]:
    """The tensors of a call without their tangents."""
    return [*map(primal_of, tensors[:GRADIENTS]), *tensors[GRADIENTS:]]


def _halves(given: Sequence[Any]) -> tuple[Sequence[Any], Sequence[Any]]:
    """The parts of the inputs of a function of tangents: for the tensors of a call, and for their tangents."""
    return given[:TENSORS], given[TENSORS : TENSORS + GRADIENTS]


def _needs_of_halves(needs: Sequence[bool]) -> tuple[Needs, Needs]:
    of_tensors, of_tangents = _halves(needs)
    return Needs(*of_tensors[:GRADIENTS]), Needs(*of_tangents)


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
            return forward_operator(*tensors, *rest.values, rest.keep_rounding)
        return forward(call, rest.keep_rounding)

    @staticmethod
    def setup_context(ctx, inputs, output) -> None:
        *tensors, ctx.rest, _ = inputs
        out, lse, _, entropy, rounding = output
        ctx.set_materialize_grads(False)
        if entropy is None or entropy.dim() == 1:  # not asked for
            ctx.mark_non_differentiable(*[x for x in output[2:] if x is not None])
            entropy = None
        elif rounding is not None:
            ctx.mark_non_differentiable(rounding)
        save(ctx, out, lse, rounding, entropy, *tensors)

    @staticmethod
    def backward(ctx, d_out, d_lse, d_max_logit, d_entropy, _):
        (out, lse, rounding, entropy, *tensors), rest = ctx.saved_tensors, ctx.rest
        results = out, lse, rounding if rest.keep_rounding else None
        needs = Needs(*ctx.needs_input_grad[:GRADIENTS])
        d_rows = RowGradients(d_lse, d_max_logit, d_entropy, None if d_entropy is None else entropy)
        if not differentiates_again():
            found = backward_pass(rest.call(tensors), results, d_out, d_rows, needs)
        elif d_max_logit is None and d_entropy is None:
            found = _gradients(rest, tensors, results, d_out, d_lse, needs)
        else:
            with torch.no_grad():
                found = backward_pass(rest.call(tensors), results, d_out, d_rows, needs)
            found = refused(_NO_SECOND_OF_ROWS, found, (*tensors[:GRADIENTS], d_out, *d_rows[:3]))
        return *found, *_OF_OTHERS, None, None

    @staticmethod
    def tangent(ctx, *tangents):
        (out, lse, rounding, entropy, *tensors), rest = ctx.saved_tensors, ctx.rest
        results = out.detach(), lse.detach(), rounding if rest.keep_rounding else None  # they get tangents after this
        along = Gradients(*tangents[:GRADIENTS])
        # torch takes no None for a result that has a graph: `AttentionAux` refuses access to these.
        of_aux = [None if entropy is None else torch.full_like(lse.detach(), torch.nan) for _ in range(2)]
        return *_tangents(rest, _primals(tensors), results, along), *of_aux, None


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
    return apply_in_backward(_Tangent, *tensors, *tangents, *results, _Asked(rest, Needs(), Needs()))


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
        *marked, d_out, d_lse = refused(_NO_THIRD, (*tensors[:GRADIENTS], d_out, d_lse))
        tensors = *marked, *tensors[GRADIENTS:]
    inputs = *tensors, *tangents, *results, d_out, d_lse, _Asked(rest, *needs)
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
        results, d_rows = (out, lse, rounding), RowGradients(d_lse)
        found = backward_pass(asked.rest.call(tensors), results, d_out, d_rows, asked.of_tensors)
        return tuple([x for x in found if x is not None])

    @staticmethod
    def backward(ctx, *cotangents):
        *tensors, out, lse, rounding, d_out, d_lse = ctx.saved_tensors
        rest, results = ctx.asked.rest, (out, lse, rounding)
        tangents = _by_field(ctx.asked.of_tensors, iter(cotangents))
        needs = Needs(*ctx.needs_input_grad[:GRADIENTS])
        d_tensors, d_d_out, d_d_lse = Gradients(), None, None
        is_along = any(ctx.needs_input_grad[TENSORS:])
        if any(needs) and is_along and not differentiates_again():
            call = rest.call(tensors)
            d_tensors, (d_d_out, d_d_lse) = second_and_tangent_pass(call, results, tangents, d_out, d_lse, needs)
        else:
            if any(needs):
                d_tensors, _ = _second(rest, tensors, results, tangents, d_out, d_lse, (needs, Needs()))
            if is_along:
                d_d_out, d_d_lse = _tangents(rest, tensors, results, tangents)
        d_d_lse = None if d_lse is None else d_d_lse
        return *d_tensors, *_OF_OTHERS, None, None, None, None if d_out is None else d_d_out, d_d_lse, None

    @staticmethod
    def tangent(ctx, *tangents):
        *tensors, out, lse, rounding, d_out, d_lse = ctx.saved_tensors
        rest, needs, results = ctx.asked.rest, ctx.asked.of_tensors, (out, lse, rounding)
        tensors, d_out, d_lse = _primals(tensors), primal_of(d_out), primal_of(d_lse)
        along, of_d_out, of_d_lse = Gradients(*tangents[:GRADIENTS]), *tangents[TENSORS + 3 : -1]
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
        tensors, tangents = _halves(given)
        return tangent_pass(asked.rest.call(tensors), (out, lse, rounding), Gradients(*tangents))

    @staticmethod
    def backward(ctx, d_out, d_lse):
        *given, out, lse, rounding = ctx.saved_tensors
        rest, results = ctx.asked.rest, (out, lse, rounding)
        (tensors, tangents), needs = _halves(given), _needs_of_halves(ctx.needs_input_grad)
        if any(needs[0]):
            found = _second(rest, tensors, results, Gradients(*tangents), d_out, d_lse, needs)
        else:
            found = Gradients(), _gradients(rest, tensors, results, d_out, d_lse, needs[1])
        return *found[0], *_OF_OTHERS, *found[1], None, None, None, None

    @staticmethod
    def tangent(ctx, *tangents):
        *given, out, lse, rounding = ctx.saved_tensors
        rest = ctx.asked.rest
        (tensors, _), (of_tensors, along) = _halves(given), _halves(tangents)
        if any(x is not None for x in of_tensors):
            raise NotImplementedError(
                'tritonattn: forward mode over forward mode is not supported; backend="reference" has it, and forward'
                " mode over reverse mode, as of torch.func.hessian, has the same numbers"
            )
        return _tangents(rest, _primals(tensors), (out, lse, rounding), Gradients(*along))


_NO_SECOND_OF_ROWS = 'max_logit and entropy have no gradients of gradients; backend="reference" has them'
_NO_THIRD = 'third derivatives are not supported; backend="reference" has them'


class _Second(_Pass):
    """The gradients of `_Tangent` that are asked for, towards the tensors, then towards their tangents."""

    @staticmethod
    def forward(*inputs):
        *given, out, lse, rounding, d_out, d_lse, asked = inputs
        tensors, tangents = _halves(given)
        results, needs = (out, lse, rounding), (asked.of_tensors, asked.of_tangents)
        found = second_pass(asked.rest.call(tensors), results, Gradients(*tangents), d_out, d_lse, needs)
        return tuple([x for some in found for x in some if x is not None])

    @staticmethod
    def backward(ctx, *cotangents):
        """The second derivatives are symmetric: those towards the tangents, from a tangent in the cotangents' place."""
        *given, out, lse, rounding, d_out, d_lse = ctx.saved_tensors
        rest, results = ctx.asked.rest, (out, lse, rounding)
        along = _by_field(ctx.asked.of_tensors, iter(cotangents))
        _, needs = _needs_of_halves(ctx.needs_input_grad)
        tensors, _ = _halves(given)
        found = Gradients()
        if any(x is not None for x in along):
            found, _ = _second(rest, tensors, results, along, d_out, d_lse, (needs, Needs()))
        raising = *tensors[:GRADIENTS], d_out, d_lse
        *zeros, of_d_out, of_d_lse = [None if x is None else x.new_zeros(()).expand_as(x) for x in raising]
        return *zeros, *_OF_OTHERS, *found, None, None, None, of_d_out, of_d_lse, None

    @staticmethod
    def tangent(ctx, *tangents):
        *given, out, lse, rounding, d_out, d_lse = ctx.saved_tensors
        asked, rest = ctx.asked, ctx.asked.rest
        (tensors, _), (_, along) = _halves(given), _halves(tangents)
        of_results = (out, lse, rounding), Gradients(*along), primal_of(d_out), primal_of(d_lse)
        found, _ = _second(rest, _primals(tensors), *of_results, (asked.of_tensors, Needs()))
        return *[x for x in found if x is not None], *[None] * sum(asked.of_tangents)


def _keep_arguments(ctx, inputs, output) -> None:
    *values, keep_rounding = inputs
    rest = _Rest(values[TENSORS:], keep_rounding)
    _Attention.setup_context(ctx, (*values[:TENSORS], rest, None), output)


def _of_operator(ctx, *gradients):
    *found, _, _ = _Attention.backward(ctx, *gradients)
    return *found, *[None] * (len(ARGUMENTS) + 1 - TENSORS)


forward_operator.register_autograd(_of_operator, setup_context=_keep_arguments)
