"""The passes of a backend over a call, run directly on real tensors and as operators on others."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..backends import BACKENDS
from ..backends.protocol import SecondOrder
from ..core.autograd import runs_eagerly, without_autocast
from ..core.call import AttentionCall, RowGradients
from ..core.eight_bit import dtype_of_sums
from ..core.terms import Gradients, Needs, Terms, others_than
from .largest import with_gradients_of_largest
from .operators import GRADIENTS, NAMES, SCHEMA, call_of, flat, operator, vmap_of_call

Saved = tuple[Tensor, Tensor, "Tensor | None"]  # out, lse, and rounding where it was kept


def forward_pass(call: AttentionCall, keep_rounding: bool) -> tuple[Tensor, ...]:
    """out, lse, max_logit, entropy and rounding, without a graph: tensors of size 0 for those not asked for."""
    if runs_eagerly(*call.tensors()):
        return _filled(forward(call, keep_rounding))
    return forward_operator(*flat(call), keep_rounding)


def backward_pass(
    call: AttentionCall,
    results: Saved,
    d_out: Tensor | None,
    d_rows: RowGradients,
    needs: Needs,
) -> Gradients:
    """Gradients of a call whose `forward_pass` returned `results`: out, lse, and rounding where it was kept."""
    if runs_eagerly(call.q, call.k, call.v, d_out, *d_rows):
        return _backward(call, results, d_out, d_rows, needs)
    filled = backward_operator(*flat(call), *results, d_out, *d_rows, list(needs))
    return Gradients(*(gradient if need else None for gradient, need in zip(filled, needs, strict=True)))


def tangent_pass(call: AttentionCall, results: Saved, tangents: Gradients) -> tuple[Tensor, Tensor]:
    """The tangents of out and lse, likewise."""
    if runs_eagerly(*call.tensors(), *tangents):
        return _tangent(call, results, tangents)
    return tangent_operator(*flat(call), *results, *tangents)


def second_pass(
    call: AttentionCall,
    results: Saved,
    tangents: Gradients,
    d_out: Tensor | None,
    d_lse: Tensor | None,
    needs: tuple[Needs, Needs],
) -> tuple[Gradients, Gradients]:
    """The gradients of `tangent_pass` towards the call's tensors and towards their tangents, likewise."""
    if runs_eagerly(*call.tensors(), *tangents, d_out, d_lse):
        return _second(call, results, tangents, d_out, d_lse, needs)[:2]
    wanted = [*needs[0], *needs[1]]
    filled = second_operator(*flat(call), *results, *tangents, d_out, d_lse, wanted)
    found = [x if need else None for x, need in zip(filled, wanted, strict=True)]
    return Gradients(*found[:GRADIENTS]), Gradients(*found[GRADIENTS:])


def second_and_tangent_pass(
    call: AttentionCall,
    results: Saved,
    tangents: Gradients,
    d_out: Tensor | None,
    d_lse: Tensor | None,
    needs: Needs,
) -> tuple[Gradients, tuple[Tensor, Tensor]]:
    """The gradients of `tangent_pass` towards the call's tensors, and its results, at once where that runs eagerly."""
    if runs_eagerly(*call.tensors(), *tangents, d_out, d_lse):
        found, _, along = _second(call, results, tangents, d_out, d_lse, (needs, Needs()), is_along=True)
        assert along is not None
        return found, along
    found, _ = second_pass(call, results, tangents, d_out, d_lse, (needs, Needs()))
    return found, tangent_pass(call, results, tangents)


def forward(call: AttentionCall, keep_rounding: bool, has_graph: bool | None = None) -> tuple[Tensor | None, ...]:
    """Run a call on its backend: out, lse, max_logit, entropy and rounding, None for those not asked for.

    has_graph   forward and backward must multiply in the same tiles; None: where wider dtypes do not tell
    """
    visible, backend = call.visibility, BACKENDS[call.backend]
    is_cache = call.cached and visible.sequences is None
    if call.block_table is not None and not (backend.reads_pages and (is_cache or call.k.shape[0] > 0)):
        call = call.gathered()
    if is_cache:
        if visible.invariant:
            call = call.by_ranges()
    elif call.q.numel() == 0 or call.k.numel() == 0:
        out, lse, max_logit, entropy, rounding = _allocate_forward(call, keep_rounding)
        aux = (max_logit.fill_(-torch.inf), entropy.zero_()) if call.aux else (None, None)
        return out.zero_(), lse.fill_(-torch.inf), *aux, rounding if keep_rounding else None
    elif visible.invariant and (first := visible.first_keys()) is not None:
        call = call.from_keys(first)
    q, v = call.q, call.v
    rounding = v.new_empty((*q.shape[:3], v.shape[3]), dtype=torch.int8) if keep_rounding else None
    if has_graph is None:
        has_graph = keep_rounding or v.dtype.itemsize > 2
    return *backend.forward(call, rounding, has_graph), rounding


def _backward(
    call: AttentionCall,
    results: Saved,
    d_out: Tensor | None,
    d_rows: RowGradients,
    needs: Needs,
) -> Gradients:
    if call.q.numel() == 0 or call.k.numel() == 0:
        return _zeros(call, needs)
    d_out, d_lse = _cotangents(results, d_out, d_rows.lse)
    _, d_max, d_entropy, entropies = d_rows
    d_rows = RowGradients(d_lse, None, None if d_entropy is None else d_entropy.resolve_neg(), entropies)
    if d_max is not None:
        of_rest = _backward(call, results, d_out, d_rows, needs)
        return with_gradients_of_largest(call, of_rest, d_max.resolve_neg(), needs)
    first = call.visibility.first_keys() if call.visibility.invariant else None
    if first is not None:
        call = call.from_keys(first)
    found = BACKENDS[call.backend].backward(call, results, d_out, d_rows, needs)
    return found if first is None else found.rolled(call.visibility.k_len - first)


def _tangent(call: AttentionCall, results: Saved, tangents: Gradients) -> tuple[Tensor, Tensor]:
    _refuse(call)
    out, lse, _ = results
    if call.q.numel() == 0 or call.k.numel() == 0:
        return torch.zeros_like(out), torch.zeros_like(lse)
    tangents = Gradients(*(None if x is None else x.resolve_neg() for x in tangents))
    return BACKENDS[call.backend].tangent(call, results, tangents)


def _second(
    call: AttentionCall,
    results: Saved,
    tangents: Gradients,
    d_out: Tensor | None,
    d_lse: Tensor | None,
    needs: tuple[Needs, Needs],
    is_along: bool = False,
) -> tuple[Gradients, Gradients, tuple[Tensor, Tensor] | None]:
    _refuse(call)
    if call.q.numel() == 0 or call.k.numel() == 0:
        along = _tangent(call, results, tangents) if is_along else None
        return _zeros(call, needs[0]), _zeros(call, needs[1]), along
    tangents = Gradients(*(None if x is None else x.resolve_neg() for x in tangents))
    d_out, d_lse = _cotangents(results, d_out, d_lse)
    return BACKENDS[call.backend].second(call, results, SecondOrder(tangents, d_out, d_lse, *needs, is_along))


# The terms that tangents and their gradients have.
_TERMS = ("query_scale", "key_scale", "key_bias", "sinks", "bias", "softcap", "bias_after_softcap")
_LACKED = others_than(*_TERMS, "relative_bias", "relative_scale", "relative_right")


def _refuse(call: AttentionCall) -> None:
    """Raise for what has no forward-mode derivatives and no gradients of gradients."""
    lacked = [Terms._fields[number] for number, default in _LACKED if call.terms[number] is not default]
    of_derivatives = "not supported with forward-mode derivatives (jvp) and gradients of gradients"
    for name in lacked:
        name = "softcap under a scaling that acts behind it" if name == "query_scale_after_softcap" else name
        raise NotImplementedError(f'{name}: {of_derivatives}; backend="reference" has them')
    if call.visibility.invariant:
        raise NotImplementedError(f"batch_invariant: {of_derivatives}; they have them without it")


def _zeros(call: AttentionCall, needs: Needs) -> Gradients:
    pairs: Any = zip(call.tensors(), needs, strict=True)
    return Gradients(*(x.new_zeros(x.shape) if need else None for x, need in pairs))


def _cotangents(results: Saved, d_out: Tensor | None, d_lse: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """Gradients as backends take them: in out's dtype, to which a compiler may have widened one."""
    out, _, _ = results
    d_out = torch.zeros_like(out) if d_out is None else d_out.to(out.dtype).resolve_neg()
    return d_out, None if d_lse is None else d_lse.resolve_neg()


def _allocate_forward(call: AttentionCall, keep_rounding: bool) -> tuple[Tensor, ...]:
    rows, out_shape = call.q.shape[:3], (*call.q.shape[:3], call.v.shape[3])
    lse = call.q.new_empty(rows, dtype=torch.promote_types(call.q.dtype, torch.float32))
    max_logit, entropy = (lse.new_empty(rows if call.aux else (0,)) for _ in range(2))
    rounding = call.v.new_empty(out_shape, dtype=torch.int8) if keep_rounding else lse.new_empty(0)
    return call.v.new_empty(out_shape, dtype=dtype_of_sums(call.q, call.v)), lse, max_logit, entropy, rounding


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
def forward_operator(*arguments):
    *arguments, keep_rounding = arguments
    with without_autocast(arguments[0]):
        return _filled(forward(call_of(arguments), keep_rounding))


@forward_operator.register_fake
def _(*arguments):
    *arguments, keep_rounding = arguments
    return _allocate_forward(call_of(arguments), keep_rounding)


_D_ROWS = "Tensor? d_lse, Tensor? d_max_logit, Tensor? d_entropy, Tensor? entropies"


@operator(
    "backward",
    f"{SCHEMA}, Tensor out, Tensor lse, Tensor? rounding, Tensor? d_out, {_D_ROWS}, bool[] needs",
    f"({', '.join(f'Tensor d_{name}' for name in Gradients._fields)})",
)
def backward_operator(*arguments):
    *arguments, out, lse, rounding, d_out, d_lse, d_max_logit, d_entropy, entropies, needs = arguments
    call, d_rows = call_of(arguments), RowGradients(d_lse, d_max_logit, d_entropy, entropies)
    found = _backward(call, (out, lse, rounding), d_out, d_rows, Needs(*needs))
    return tuple(call.q.new_empty(0) if x is None else x.contiguous() for x in found)


@backward_operator.register_fake
def _(*arguments):
    pairs = zip(arguments[:GRADIENTS], arguments[-1], strict=True)
    return tuple(x.new_empty(x.shape) if need else arguments[0].new_empty(0) for x, need in pairs)


_RESULTS = "Tensor out, Tensor lse, Tensor? rounding"
_TANGENTS = ", ".join(f"Tensor? tangent_{name}" for name in Gradients._fields)


@operator("tangent", f"{SCHEMA}, {_RESULTS}, {_TANGENTS}", "(Tensor out_tangent, Tensor lse_tangent)")
def tangent_operator(*arguments):
    call, results, tangents = _parts_of(arguments)
    return tuple(x.contiguous() for x in _tangent(call, results, tangents))


@tangent_operator.register_fake
def _(*arguments):
    _, (out, lse, _), _ = _parts_of(arguments)
    return out.new_empty(out.shape), lse.new_empty(lse.shape)


@operator(
    "second",
    f"{SCHEMA}, {_RESULTS}, {_TANGENTS}, Tensor? d_out, Tensor? d_lse, bool[] needs",
    f"({', '.join(f'Tensor d_{kind}{name}' for kind in ('', 'tangent_') for name in Gradients._fields)})",
)
def second_operator(*arguments):
    *arguments, d_out, d_lse, needs = arguments
    call, results, tangents = _parts_of(arguments)
    both = Needs(*needs[:GRADIENTS]), Needs(*needs[GRADIENTS:])
    of_tensors, of_tangents, _ = _second(call, results, tangents, d_out, d_lse, both)
    return tuple(call.q.new_empty(0) if x is None else x.contiguous() for x in (*of_tensors, *of_tangents))


@second_operator.register_fake
def _(*arguments):
    pairs = zip([*arguments[:GRADIENTS]] * 2, arguments[-1], strict=True)
    return tuple(x.new_empty(x.shape) if need else arguments[0].new_empty(0) for x, need in pairs)


def _parts_of(arguments: Sequence[Any]) -> tuple[AttentionCall, Saved, Gradients]:
    """The call, its results and tangents."""
    count = len(NAMES)
    return call_of(arguments[:count]), tuple(arguments[count : count + 3]), Gradients(*arguments[count + 3 :])  # pyright: ignore[reportReturnType]


for _operator in (forward_operator, backward_operator, tangent_operator, second_operator):
    _operator.register_vmap(functools.partial(vmap_of_call, _operator))
