"""A scale folded into an operand, with gradients of both in fp32."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd.function import Function

from ...core.autograd import apply, first_order


def folded(x: Tensor, wide: Tensor | None, scale: Tensor | None, seen: Tensor | None, dtype: torch.dtype) -> Tensor:
    """x [B, H, S, D] times scale [B, H, S], computed in fp32 and rounded to dtype once.

    x      may hold values of dtype in fp32; its gradient is then fp32
    wide   as `AttentionCall.wide_q`, or None
    seen   bool, broadcastable to [B, H, S]: the result and gradients are 0 elsewhere, whatever x holds there and a
           library leaves there; None: all
    """
    if scale is None and seen is None and wide is None:
        return x if x.dtype == dtype else x.to(dtype)
    return apply(_Fold, x if wide is None else x.detach(), wide, scale, seen, dtype)


class _Fold(Function):
    """With y = x * scale and a gradient d of y in 16 bits: d_x = d * scale, d_scale = sum_D d * x, both in fp32."""

    @staticmethod
    def forward(x, wide, scale, seen, dtype):
        if scale is not None:
            x = torch.mul(x, scale[..., None], out=torch.empty_like(x, dtype=dtype))
        elif seen is None:
            return x.view_as(x) if x.dtype == dtype else x.to(dtype)
        return x if seen is None else torch.where(seen[..., None], x, 0).to(dtype)

    @staticmethod
    def setup_context(ctx, inputs, output) -> None:
        x, wide, scale, seen, _ = inputs
        ctx.dtype = x.dtype if wide is None else wide.dtype
        ctx.save_for_backward(None if scale is None else x, scale, seen)

    @staticmethod
    @first_order
    def backward(ctx, saved, d):
        x, scale, seen = saved
        d_x = d_scale = None
        needs_x, needs_wide, needs_scale, *_ = ctx.needs_input_grad
        if needs_scale:
            d_scale = (d.float() * x).sum(-1)
            d_scale = d_scale if seen is None else torch.where(seen, d_scale, 0)
        if needs_x or needs_wide:
            d_x = d.to(ctx.dtype) if scale is None else (d * scale[..., None]).to(ctx.dtype)
            d_x = d_x if seen is None else torch.where(seen[..., None], d_x, 0)
        return d_x if needs_x else None, d_x if needs_wide else None, d_scale, None, None
