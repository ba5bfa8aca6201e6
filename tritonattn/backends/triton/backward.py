"""The gradients of a call: terms of its rows, then a pass over rows and one over keys."""

from __future__ import annotations

import torch
from torch import Tensor

from ...core.call import AttentionCall, Gradients, Needs
from ...tuning.config import corrects_delta
from .attention import aligned_copy, call_arguments, new_results, of_kind, one_layout
from .block import Results
from .grad_key_value import grad_key_value
from .grad_query import grad_query
from .launch import strided
from .row_terms import row_terms


def backward(
    call: AttentionCall,
    out: Tensor,
    lse: Tensor,
    d_out: Tensor,
    d_lse: Tensor | None,
    needs: Needs,
    rounding: Tensor | None = None,
) -> Gradients:
    """Gradients by the row-terms, grad_query and grad_key_value kernels.

    out, lse and rounding as `forward` left them; d_out [B, Hq, Sq, Dv] in out's dtype and d_lse fp32 [B, Hq, Sq], any
    strides.
    """
    wide_q = call.wide_q is not None or call.q.dtype != call.v.dtype
    wide_k = call.wide_k is not None or call.k.dtype != call.v.dtype
    d_out = one_layout(d_out) if call.visibility.invariant else aligned_copy(d_out)
    call, kind = of_kind(
        call,
        d_out,
        needs,
        aux=d_lse is not None,
        rounding=rounding is not None,
        query_scale_grad=needs.query_scale,
        wide_q=wide_q,
        wide_k=wide_k,
        is_part=call.is_part,
    )
    shared = call_arguments(call) | {"d_out": strided(d_out)}
    shared["d_lse_ptr"] = None if d_lse is None else d_lse.contiguous()
    corrects = needs.query_scale or call.logits.key_bias is not None or corrects_delta(kind.problem)
    takes_sinks = call.logits.sinks is not None and (needs.sinks or corrects)
    d_sinks = new_results(call, lse.shape, torch.float32) if takes_sinks else None
    shared["d_sinks_ptr"] = d_sinks
    rounding = None if rounding is None else rounding.contiguous()
    results = Results(out.contiguous(), rounding, lse.contiguous(), None, None)
    shared |= row_terms(kind, call, shared, results, d_out)
    d_q, d_query_scale = grad_query(kind, call, shared, needs, d_out)
    of_keys = grad_key_value(kind, call, shared, needs, d_out)
    d_sinks = d_sinks.sum((0, 2)) if d_sinks is not None and needs.sinks else None
    values = of_keys._replace(q=d_q, query_scale=d_query_scale, sinks=d_sinks)
    needed = [value if need else None for value, need in zip(values, needs, strict=True)]
    return Gradients(*needed)
