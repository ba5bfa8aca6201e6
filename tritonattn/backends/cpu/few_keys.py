"""A bias of pairs with a gradient over few keys, as in windows of an image: all logits at once, whose softmax is kept.

It takes no more memory than q, k, v and the output: memory stays O(S D).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.autograd.function import Function

from ...core.autograd import apply_with_graph, gradients_again, needs_graph, values_are_read, without_autocast
from ...core.call import AttentionCall, ForwardResult
from ...core.private_names import private
from ...core.terms import Terms, has_any, others_than
from ...core.visibility import Visibility
from ..protocol import Attend


def _slow_softmax_backward(d_weight: Tensor, weight: Tensor, dim: int, dtype: torch.dtype) -> Tensor:
    return weight * (d_weight - (weight * d_weight).sum(dim, keepdim=True))


_softmax_backward_data = private("torch.ops.aten._softmax_backward_data", _slow_softmax_backward)

# Keys over the head dim, at most: one for each of q, k, v and the output.
_KEYS = 4

# The terms that would take further operators.
_OTHERS = others_than("query_scale", "key_scale", "bias")


def takes(call: AttentionCall) -> bool:
    """True where each row attends to all of few keys, and a bias of pairs has a gradient."""
    terms, visible = call.terms, call.visibility
    if terms.bias is None or not needs_graph(terms.bias) or forward_ad._current_level >= 0:
        return False
    if has_any(terms, _OTHERS) or call.dropout is not None:
        return False
    if call.aux or visible.invariant or not values_are_read(*call.tensors()):
        return False
    is_small = visible.k_len <= _KEYS * min(call.q.shape[3], call.v.shape[3])
    is_plain = visible.is_full and visible.q_heads == visible.kv_heads
    return is_small and is_plain and math.isfinite(terms.bias.detach().sum())


def attention(call: AttentionCall, again: Attend) -> ForwardResult:
    """The output [B, H, Sq, Dv] of a call that it `takes`, without an lse, differentiable by autograd.

    again   runs a call for gradients of gradients
    """
    terms, dtype = call.terms, torch.promote_types(call.q.dtype, torch.float32)
    q, k, v, bias = (x.to(dtype) for x in (call.q, call.k, call.v, terms.bias) if x is not None)
    q = q if terms.query_scale is None else q * terms.query_scale[..., None]
    k = k if terms.key_scale is None else k * terms.key_scale[..., None]
    out = apply_with_graph(_Attention, q, k, v, bias, terms.scale, again)
    return ForwardResult(out.to(call.v.dtype), None)  # pyright: ignore[reportArgumentType]


class _Attention(Function):
    """softmax(scale * q . k + bias) v, all in one dtype."""

    @staticmethod
    def forward(ctx, *inputs):
        q, k, v, bias, ctx.scale, ctx.again = inputs
        (batch, heads, rows, _), keys = q.shape, k.shape[2]
        logit = bias.new_empty(batch, heads, rows, keys).copy_(bias)
        logit.flatten(0, 1).baddbmm_(q.flatten(0, 1), k.flatten(0, 1).mT, alpha=ctx.scale)
        weight = logit.softmax(-1)
        ctx.save_for_backward(q, k, v, bias, weight)
        return weight @ v

    @staticmethod
    def backward(ctx, *gradients):
        (q, k, v, bias, weight), (d_out,), needs = ctx.saved_tensors, gradients, ctx.needs_input_grad[:4]
        if torch.is_grad_enabled():

            def plain(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
                return ctx.again(AttentionCall(q, k, v, Visibility.of(q, k), Terms(ctx.scale, bias=bias))).out

            return *gradients_again(plain, (q, k, v, bias), needs, d_out), None, None
        with without_autocast(d_out):
            d_weight = d_out @ v.mT
            d_logit = _softmax_backward_data(d_weight, weight, -1, weight.dtype)
            d_q = (d_logit @ k).mul_(ctx.scale) if needs[0] else None
            d_k = (d_logit.mT @ q).mul_(ctx.scale) if needs[1] else None
            d_v = weight.mT @ d_out if needs[2] else None
            d_bias = d_logit.sum_to_size(bias.shape) if needs[3] else None
            return d_q, d_k, d_v, d_bias, None, None
