"""The CPU path for plain and square-causal calls: scales folded into q and k, then PyTorch's own attention.

torch.nn.functional.scaled_dot_product_attention has one fast kernel for CPUs; its memory is O(S D), backward
included. It leaves that kernel for an O(Sq Sk) one where v's head_dim differs from q's or a last axis is
strided; so the narrower operands are padded with zeros and strided ones copied. Key heads are not expanded.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd.function import Function
from torch.nn.functional import pad, scaled_dot_product_attention

from .autograd import apply, first_order, needs_graph, runs_eagerly
from .call import AttentionCall

# Rows over which PyTorch may sum gradients in 16 bits. It rounds after each block of 64 (256 from 768 rows up): with 4
# blocks gradients take up to 0.8 of the bound, with 7 up to 1.0, with 8 to 12 up to 1.5.
_ROWS_SUMMED = 256

# Causal rows whose gradients are computed apart. In 1,000 heads of D = 256 (randn; factors 1 / n and 1 / sqrt(n)) those
# of q and k take up to 10 times the bound where there are none, 1.3 where there are 4, 0.8 where there are 16.
_FIRST_ROWS = 16


def supports(call: AttentionCall) -> bool:
    """Whether `attention` computes this call: all keys or a square's lower triangle seen, and no extras."""
    if call.softcap is not None or call.sinks is not None or call.dropout is not None:
        return False
    empty = 0 in call.q.shape or 0 in call.k.shape or 0 in call.v.shape
    return not empty and (call.visibility.is_full or call.visibility.is_square_causal)


def attention(call: AttentionCall) -> Tensor:
    """The output [B, Hq, Sq, Dv] of a call that `supports` accepts, differentiable by autograd.

    The scales are folded in q's dtype: exact to rounding in fp32 and fp64, while in bf16 q * query_scale and
    k * key_scale are rounded to bf16 once before they meet.
    """
    q, k, v = call.q, call.k, call.v
    width, value_width = max(q.shape[-1], v.shape[-1]), v.shape[-1]
    if _needs_fp32(call):
        q, k, v = q.float(), k.float(), v.float()
    first = None
    if _starts_sharp(call):
        (q, q_first), (k, k_first), (v, v_first) = (_Split.apply(x) for x in (q, k, v))
        first = _first_rows(q_first, k_first, v_first, call)
    q, k = _fold(q, call.query_scale), _fold(k, call.key_scale)
    scale = call.scale
    if scale <= 0:  # the kernel hides keys by -inf before it multiplies
        q, scale = q * (-1 if scale < 0 else 0), -scale or 1.0
    out = scaled_dot_product_attention(
        _for_kernel(q, width), _for_kernel(k, width), _for_kernel(v, width), scale=scale,
        is_causal=_as_bool(not call.visibility.is_full), enable_gqa=_as_bool(q.shape[1] != k.shape[1]),
    )  # fmt: skip
    out = out if value_width == width else out[..., :value_width]
    out = out if first is None else _DerivativeOfFirst.apply(out, first)
    return out.to(call.q.dtype)


def _needs_fp32(call: AttentionCall) -> bool:
    """Whether PyTorch's kernel in the call's own 16 bits would be off by more than rounding its operands.

    A scaled q can leave the range of fp16: 1 / n of a long sequence is a subnormal. PyTorch sums the gradients of
    a key head over the query heads of its group, and over blocks of rows, in 16 bits. And it takes the softmax's
    derivative from a rounded output, an error that the gradient of query_scale has times the mean logit, and that
    those of q and k feel where a small scale leaves little else of them.
    """
    is_scaled = call.query_scale is not None
    if call.q.dtype == torch.bfloat16 and is_scaled and needs_graph(call.q, call.k, call.query_scale):
        return True
    if call.q.dtype == torch.float16 and (is_scaled or call.key_scale is not None):
        return True
    narrow = call.q.dtype in (torch.float16, torch.bfloat16)
    summed = call.q.shape[1] != call.k.shape[1] or call.q.shape[2] > _ROWS_SUMMED
    return narrow and summed and call.q.device.type == "cpu" and needs_graph(call.q, call.k, call.v)


def _starts_sharp(call: AttentionCall) -> bool:
    """Whether gradients of the first rows need care: causal, and scaled by row, so perhaps by a function of n.

    Scaled by 1 / n, rows of few keys have the largest logits and gradients of all. dS = P (dP - delta) is then a small
    difference, and PyTorch's kernel takes delta, the sum of P dP, from the output: rounded otherwise than dP is.
    """
    is_by_row = call.query_scale is not None and not call.visibility.is_full
    return is_by_row and needs_graph(call.q, call.k, call.query_scale)


def _first_rows(q: Tensor, k: Tensor, v: Tensor, call: AttentionCall) -> Tensor:
    """Rows [B, Hq, R, Dv] of the causal output from the first R of q, k and v, by eager operators."""
    rows, group = q.shape[2], q.shape[1] // k.shape[1]
    logits = q.unflatten(1, (-1, group)) @ k.unsqueeze(2).mT * call.scale  # [B, Hkv, group, R, R]
    if call.query_scale is not None:
        logits = logits * call.query_scale[:, :, :rows, None].unflatten(1, (-1, group))
    if call.key_scale is not None:
        logits = logits * call.key_scale[:, :, None, None, :rows]
    hidden = torch.ones(rows, rows, dtype=torch.bool, device=q.device).triu(1)
    return (logits.masked_fill(hidden, -torch.inf).softmax(-1) @ v.unsqueeze(2)).flatten(1, 2)


def _as_bool(condition: bool) -> bool:
    """A comparison of sizes as the bool that PyTorch's attention wants: under torch.compile it is a SymBool."""
    return True if condition else False


def _fold(x: Tensor, scale: Tensor | None) -> Tensor:
    return x if scale is None else apply(_Fold, x, scale)


def _for_kernel(x: Tensor, width: int) -> Tensor:
    """x with the head_dim and the strides that PyTorch's fast kernel takes.

    Of rows that overlap, as those of `unfold`, it reads memory that is none of theirs.
    """
    if x.shape[-1] < width:
        x = pad(x, (0, width - x.shape[-1]))  # which keeps an order of axes
    is_taken = x.stride(-1) == 1 and x.stride(-2) >= width
    return x if is_taken else x.clone(memory_format=torch.contiguous_format)


def _first(x: Tensor) -> Tensor:
    # Not a slice of [:, :, :R]: a batch of torch.autograd.grad has no rule for the axes that are taken whole.
    return x.narrow(2, 0, min(x.shape[2], _FIRST_ROWS))


class _Split(Function):
    """x [B, H, S, D] as it is, and its first rows; their gradients come back as one."""

    @staticmethod
    def forward(x: Tensor) -> tuple[Tensor, Tensor]:
        return x.view_as(x), _first(x).clone()

    @staticmethod
    def setup_context(ctx, inputs, output) -> None:
        pass

    @staticmethod
    @first_order
    def backward(ctx, saved, g: Tensor, g_first: Tensor):
        is_own = runs_eagerly(g) and not g.requires_grad  # of attention alone: see _Fold
        total = g if is_own else g.clone()
        _first(total).add_(g_first)
        return total


class _DerivativeOfFirst(Function):
    """out [B, H, S, Dv] with the derivative of `first`, [B, H, R, Dv], in its first R rows, whose values are the same."""

    @staticmethod
    def forward(out: Tensor, first: Tensor) -> Tensor:
        return out.view_as(out)

    @staticmethod
    def setup_context(ctx, inputs, output) -> None:
        pass

    @staticmethod
    @first_order
    def backward(ctx, saved, g: Tensor):
        rest = g.clone()
        _first(rest).zero_()
        return rest, _first(g).clone()


class _Fold(Function):
    """x [B, H, S, D] times scale [B, H, S], in x's dtype. It keeps nothing but its inputs for backward."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, scale: Tensor) -> Tensor:
        return _times(x, scale)

    @staticmethod
    def setup_context(ctx, inputs, output) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    @first_order
    def backward(ctx, saved, g: Tensor):
        x, scale = saved
        needs_x, needs_scale = ctx.needs_input_grad
        d_scale = torch.linalg.vecdot(g.to(scale.dtype), x.to(scale.dtype)) if needs_scale else None
        if not needs_x:
            return None, d_scale
        # The product is known to attention alone, so that its gradient is nobody else's: fresh memory takes longer.
        in_place = runs_eagerly(g, scale) and g.dtype == scale.dtype
        return g.mul_(scale[..., None]) if in_place else _times(g, scale), d_scale


def _times(x: Tensor, scale: Tensor) -> Tensor:
    # A result takes the layout of its first factor: a contiguous scale saves autograd a copy of the gradient.
    return (scale.contiguous().unsqueeze(-1) * x).to(x.dtype)
