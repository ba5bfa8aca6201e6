"""From the checked arguments of a public call to a backend, and to what the call returns."""

from __future__ import annotations

from typing import NamedTuple, cast

import torch
from torch import Tensor

from .. import ops
from ..backends import reference
from ..backends.cpu import sdpa
from ..core.autograd import autocast_is_on, is_compiled_transform, is_transformed, without_autocast
from ..core.call import AttentionCall, ForwardResult
from ..core.dropout import Dropout
from ..core.observation import ObservedCall, is_observed, notify_observers
from ..core.statistics import Statistics
from ..core.visibility import Visibility
from .backend import choose_backend
from .checks import Options
from .factor import Factor, scale_dtype


class AttentionAux(NamedTuple):
    """The softmax of each row before dropout and sinks: [B, Hq, Sq], fp32 (fp64 for fp64 q), natural log.

    lse         ln sum_j exp(logit[i, j]) over the visible keys, after softcap; differentiable
    max_logit   max_j logit[i, j], before softcap; not differentiable
    entropy     -sum_j p[i, j] ln p[i, j], after softcap; not differentiable

    A row without keys has lse = max_logit = -inf and entropy 0.
    """

    lse: Tensor
    max_logit: Tensor
    entropy: Tensor


def autocast(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """q, k, v in the dtype of torch.autocast where it is on; float64 stays, as in torch's own operators."""
    if not isinstance(q, Tensor) or not autocast_is_on(q):
        return q, k, v
    dtype = torch.get_autocast_dtype(q.device.type)

    def cast(x: Tensor) -> Tensor:
        eligible = isinstance(x, Tensor) and x.is_floating_point() and x.dtype != torch.float64
        return x.to(dtype) if eligible else x

    return cast(q), cast(k), cast(v)


def attend(
    q: Tensor, k: Tensor, v: Tensor, factor: Factor, visibility: Visibility, options: Options
) -> Tensor | tuple[Tensor, AttentionAux]:
    """Attention of checked operands [B, H, S, D] on the backend that `options` asks for."""
    if is_compiled_transform():
        # Dynamo's own rules for autograd functions in torch.func.grad gave wrong gradients. What raises it leaves
        # uncompiled; fullgraph=True hands the error on.
        raise RuntimeError("tritonattn: a torch.func transform of attention is not compiled")
    result = _attend(q, k, v, factor, visibility, options)
    if is_observed():

        def aux() -> AttentionAux:
            again = options._replace(return_aux=True, dropout_p=0.0)
            with torch.no_grad():
                narrow = k.detach()[..., :1]  # its values reach nothing that is read
                return cast(tuple[Tensor, AttentionAux], _attend(q, k, narrow, factor, visibility, again))[1]

        out = result[0] if isinstance(result, tuple) else result
        notify_observers(ObservedCall(q, k, out, visibility, options.softcap, aux))
    return result


def _attend(
    q: Tensor, k: Tensor, v: Tensor, factor: Factor, visibility: Visibility, options: Options
) -> Tensor | tuple[Tensor, AttentionAux]:
    if autocast_is_on(q):
        with without_autocast(q):
            return _attend(q, k, v, factor, visibility, options)
    backend = choose_backend(q, k, v, options)
    dropout = Dropout.draw(options.dropout_p, q.device) if options.dropout_p > 0 else None
    sinks = None if options.sinks is None else options.sinks.to(scale_dtype(q))
    if backend == "reference":
        result = reference.attention(
            q,
            k,
            v,
            factor.multiplier(q, k, visibility),
            visibility,
            softcap=options.cap,
            sinks=sinks,
            dropout=dropout,
        )
    else:
        statistics = (ops.KernelStatistics if backend == "triton" else Statistics)(k, visibility)
        constant, query, key = factor.scales(q, k, visibility, statistics)
        q, k = statistics.operands(q, k)
        call = AttentionCall(q, k, v, visibility, constant, query, key, options.cap, sinks, dropout)
        if not options.return_aux:
            return _out(call, backend)
        result = ops.attention(call, backend, aux=True)
    if not options.return_aux:
        return result.out
    return result.out, aux_of(result)


def aux_of(result: ForwardResult) -> AttentionAux:
    """Of a call that was asked for it."""
    assert result.max_logit is not None
    assert result.entropy is not None
    return AttentionAux(result.lse, result.max_logit, result.entropy)


def _out(call: AttentionCall, backend: str) -> Tensor:
    # torch maps its own attention in a loop under vmap; our operators fold the mapped axis into the batch.
    if backend == "sdpa" and not is_transformed() and sdpa.supports(call):
        return sdpa.attention(call)
    return ops.attention(call, backend, aux=False).out
