"""The gradient of a tangent: terms of its rows by the tangent kernel, then a pass over rows and one over keys."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ...core.call import AttentionCall
from ...core.terms import Gradients
from ..protocol import SecondOrder
from .attention import Prepared, aligned_copy, largest, launch_kernel, new_results, seen_scales
from .backward import new_gradients, of_keys, of_rows, row_bounds, summed
from .grad_key_value_second import attention_grad_key_value_second
from .grad_query_second import attention_grad_query_second
from .grids import over_keys, over_rows
from .launch import KERNELS
from .records import SecondTerms
from .tangent import Saved, launch_tangent, with_tangents

KERNELS |= {
    "grad_query_second": attention_grad_query_second,
    "grad_key_value_second": attention_grad_key_value_second,
}
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

    found = [new_gradients(ready, asked) for asked in (needs, needs_tangents)]
    names = {name for one in (needs, needs_tangents) for name, is_asked in one._asdict().items() if is_asked}
    if names & _OF_ROWS:
        _over_rows(ready, found, terms)
    if names - _OF_ROWS - _OF_SINKS:
        _over_keys(ready, found, terms)
    one, other = (summed(x, call)._replace(sinks=d_sinks) for x, d_sinks in zip(found, sinks, strict=True))
    return one, other, along


def _over_rows(ready: Prepared, found: list[Gradients], row_terms: SecondTerms) -> None:
    """Launch the pass for the gradients towards q and query_scale, and towards their tangents."""
    call, key_scale, key_size = ready.call, ready.call.terms.key_scale, None
    if key_scale is not None and call.q.dtype == torch.float16:
        sizes = [key_scale, ready.tangents.key_scale]
        key_size = largest(torch.cat([seen_scales(x, call.visibility) for x in sizes if x is not None], -1))
    arguments = {
        "row_terms": row_terms,
        "gradients": of_rows(found[0]),
        "t_gradients": of_rows(found[1]),
        "key_size": key_size,
    }
    launch_kernel("grad_query_second", ready, arguments, over_rows)


def _over_keys(ready: Prepared, found: list[Gradients], row_terms: SecondTerms) -> None:
    """Launch the pass for the gradients towards k, v, key_scale, biases and relative scale, and their tangents."""
    factors = [x for x in (ready.call.terms.query_scale, ready.tangents.query_scale) if x is not None]
    factor_size = None
    if factors and ready.call.q.dtype == torch.float16:
        factor_size = largest(torch.cat(factors, -1).unflatten(1, (ready.sizes.kv_heads, -1)).flatten(2))
    arguments = {
        "row_terms": row_terms,
        "gradients": of_keys(found[0]),
        "t_gradients": of_keys(found[1]),
        "factor_size": factor_size,
    }
    of_plan = None if ready.arguments["masks"].key_ranges is None else row_bounds
    launch_kernel("grad_key_value_second", ready, arguments, over_keys, of_plan=of_plan)
