"""A checked call by the dense formulas of its scaling: the way to the reference."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..backends import reference
from ..core.call import ForwardResult, Request
from ..core.dropout import Dropout
from ..scaling import Scaling
from .checks import FLOATS, broadcasts, check_number, scale_dtype, shape_of


def by_formulas(request: Request, dropout: Dropout | None = None) -> ForwardResult:
    """The results of a checked request by the formulas of its scaling."""
    dtype = request.q.dtype if request.cached else request.v.dtype  # q may be wider, for its gradient
    request = request.gathered()
    multiplier, addend = dense(request)
    q, k, v, visible = request.q, request.k, request.v, request.visibility
    terms = request.terms
    if request.scaling.after_softcap and terms.softcap is not None:
        cap = softcap_behind(request, multiplier)
        terms = terms.changed(softcap=cap.to(scale_dtype(q)) if isinstance(cap, Tensor) else cap)
    out, lse, max_logit, entropy = reference.attention(q, k, v, multiplier, visible, addend, terms, dropout)
    return ForwardResult(out.to(dtype), lse, max_logit, entropy)  # torch 2.8 traces no _replace


def softcap_behind(request: Request, factor: Any, query: Tensor | None = None) -> Any:
    """The softcap of a request times factor * sqrt(D) without the gain, where its scaling is `after_softcap`.

    query   of its `Scales`

    Raises NotImplementedError for a gain that is a tensor, and a query that needs a gradient.
    """
    scaling, gain = request.scaling, request.gain
    name = getattr(scaling, "name", type(scaling).__name__)
    if isinstance(gain, Tensor):
        raise NotImplementedError(f"gain: expected a number beside softcap and {name}, got a tensor")
    if query is not None and query.requires_grad:
        raise NotImplementedError(f"scaling: expected a {name} whose query needs no gradient beside softcap, got one")
    softcap, gain = request.terms.softcap, 1.0 if gain is None else gain
    return softcap * factor * (request.q.shape[3] ** 0.5 / gain) if gain else softcap


def dense(request: Request, k: Tensor | None = None) -> tuple[Tensor | float, Tensor | None]:
    """The factor and the addend of every pair that a checked request's scaling and gain give, for the reference.

    k   as in `logits`
    """
    q, scaling, visibility, gain = request.q, request.scaling, request.visibility, request.gain
    group = visibility.q_heads // visibility.kv_heads
    visible = visibility.dense()
    has_row, has_key = visible.any(-2)[..., None], visible.any(-1)  # [B, Hq, Sk, 1], [B, Hq, Sq]
    keys = torch.where(has_row, (request.k if k is None else k).repeat_interleave(group, dim=1), 0)
    queries, pairs = torch.where(has_key[..., None], q, 0), (*visibility.rows, visibility.k_len)
    factor, bias = scaling.multiplier(queries, keys, visible), scaling.addend(queries, keys, visible)
    if isinstance(factor, Tensor):
        _check_dense(scaling, "multiplier", factor, pairs)
    else:
        check_number(f"{type(scaling).__name__}.multiplier()", factor)
    if bias is not None:
        _check_dense(scaling, "addend", bias, pairs)
    distance = visibility.positions()[:, None, :, None] - torch.arange(visibility.k_len, device=q.device)
    of_distance = scaling.relative_multiplier(queries, keys, distance)
    if of_distance is not None:
        _check_dense(scaling, "relative_multiplier", of_distance, pairs)
        factor = factor * of_distance
    of_distance = scaling.relative_addend(queries, keys, distance)
    if of_distance is not None:
        _check_dense(scaling, "relative_addend", of_distance, pairs)
        bias = of_distance if bias is None else bias + of_distance
    if gain is not None:
        factor = factor * (torch.where(has_key, gain, 0)[..., None] if isinstance(gain, Tensor) else gain)
    return factor, bias


def _check_dense(scaling: Scaling, method: str, factor: Tensor, shape: tuple[int, ...]) -> None:
    """Raise unless a mode's dense formula `method` returned a floating tensor for every pair."""
    name = f"{type(scaling).__name__}.{method}()"
    if factor.dtype not in FLOATS:
        raise TypeError(f"{name}: expected a floating dtype, got {factor.dtype}")
    if not broadcasts(factor.shape, shape):
        raise ValueError(
            f"{name}: expected a shape broadcastable to [B, Hq, Sq, Sk] = {list(shape)}, got {shape_of(factor)}"
        )
