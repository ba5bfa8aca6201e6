"""The gradient of a tangent: terms of its rows by the tangent kernel, then a pass over rows and one over keys."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ...core.call import AttentionCall
from ...core.terms import Gradients
from ..protocol import SecondOrder
from .attention import aligned_copy, new_results
from .grad_key_value_second import grad_key_value_second
from .grad_query_second import grad_query_second
from .records import SecondTerms
from .tangent import Saved, launch_tangent, with_tangents

_OF_ROWS, _OF_SINKS = {"q", "query_scale"}, {"sinks"}


def second(
    call: AttentionCall, saved: Saved, asked: SecondOrder
) -> tuple[Gradients, Gradients, tuple[Tensor, Tensor] | None]:
    """The gradients of `tangent` towards the call's tensors and towards their tangents, by the three kernels.

    The launch that makes the terms of rows may have the results of `tangent` too.
    """
    tangents, d_out, d_lse, needs, needs_tangents, is_along = asked
    flags = {
        "aux": d_lse is not None,
        "rounding": saved[2] is not None,
        "query_scale_grad": needs.query_scale or needs_tangents.query_scale,
        "fp32_grad_q": call.q.dtype != call.v.dtype,
        "fp32_grad_k": call.k.dtype != call.v.dtype,
    }
    ready = with_tangents(call, tangents, aligned_copy(d_out), asked[3:], **flags)
    call, lse = ready.call, saved[1]
    sinks = [new_results(call, lse) if one.sinks else None for one in (needs, needs_tangents)]
    terms = SecondTerms(*(new_results(call, lse, fill=x) for x in (-float("inf"), 0.0, 0.0, 0.0)), *sinks)
    arguments: dict[str, Any] = {"row_terms": terms, "d_lse_ptr": None if d_lse is None else d_lse.contiguous()}
    along = None
    if is_along:
        along = new_results(call, saved[0], saved[0].dtype), new_results(call, lse)
        arguments |= dict(zip(("out_tangent_ptr", "lse_tangent_ptr"), along, strict=True))
    launch_tangent(ready, saved, arguments)

    found, of_tangents = Gradients(sinks=sinks[0]), Gradients(sinks=sinks[1])
    names = {name for one in (needs, needs_tangents) for name, is_asked in one._asdict().items() if is_asked}
    for launch, is_asked in (
        (grad_query_second, names & _OF_ROWS),
        (grad_key_value_second, names - _OF_ROWS - _OF_SINKS),
    ):
        if is_asked:
            more, more_of_tangents = launch(ready, needs, needs_tangents, terms)
            found, of_tangents = _joined(found, more), _joined(of_tangents, more_of_tangents)
    return found, of_tangents, along


def _joined(some: Gradients, others: Gradients) -> Gradients:
    return Gradients(*(x if y is None else y for x, y in zip(some, others, strict=True)))
