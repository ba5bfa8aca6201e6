"""The CPU path for plain and square-causal calls: scales folded into q and k, then PyTorch's own attention.

torch.nn.functional.scaled_dot_product_attention has one fast kernel for CPUs; its memory is O(S D), backward
included. It leaves that kernel for an O(Sq Sk) one where v's head_dim differs from q's or a last axis is
strided; so the narrower operands are padded with zeros and strided ones copied. Key heads are not expanded.
"""

from __future__ import annotations

import math
from dataclasses import replace

import torch
from torch import Tensor
from torch.autograd.function import Function
from torch.nn.functional import pad, scaled_dot_product_attention

from ...core.autograd import apply, first_order, needs_graph, runs_eagerly, without_autocast
from ...core.call import AttentionCall
from ...core.visibility import Visibility
from . import first_rows

# Causal rows whose gradients are computed apart. Of 1,000 heads of D = 256 (randn; factors 1 / n and 1 / sqrt(n)) those
# of q and k take up to 10 times the bound where there are none, 1.3 times with 4, 0.8 with 16.
_FIRST_ROWS = 16

# Of a head's keys and values: about as many say whether a look at all of them is worth it.
_SAMPLED_KEYS = 32

# Elements of a product that is rounded before it leaves the caches: one of all of x in fp32 is fresh memory, and takes
# two to three times as long.
_CACHED = 2**18

# Share of the mean in a head's sum of squares. At a half, gradients still take at most 0.9 of the bound.
_LARGE_MEAN = 0.25

# Length of a mean over that of the shortest key or value from which it may be taken, whose rounding grows as much.
_FAR = 4.0

# Times 1 / sqrt(D): with a factor of three in all rows, gradients take up to 0.6 of the bound.
_SHARP = 2.0

# Keys that PyTorch's kernel for CPUs compares at a time, at most.
_VECTOR = 16

# Whether PyTorch's kernel for CPUs serves several query heads with one key head.
_SHARES_KEY_HEADS = torch.__version__ >= "2.9"

# What no logit may pass whose kernel is PyTorch's: fp32 ends at 3.4e38.
_LARGEST_LOGIT = 1e38


def supports(call: AttentionCall) -> bool:
    """Whether `attention` computes this call: all keys or a square's lower triangle seen, and no extras."""
    if call.softcap is not None or call.sinks is not None or call.dropout is not None:
        return False
    empty = 0 in call.q.shape or 0 in call.k.shape or 0 in call.v.shape
    return not empty and (call.visibility.is_full or call.visibility.is_square_causal) and not _hides_nan(call)


def _hides_nan(call: AttentionCall) -> bool:
    """Whether PyTorch's kernel may take a row of NaN for one without keys, and return 0 or what was in memory.

    In a rest of keys that fills no vector its maximum passes over NaN: of fewer keys nothing is left. No logit is NaN
    where the product of all norms, which bounds every one and every sum on the way to it, is in fp32's range.
    """
    if not (runs_eagerly(call.k) and call.k.device.type == "cpu" and call.k.shape[2] < _VECTOR):
        return False
    operands = [x for x in (call.q, call.k, call.query_scale, call.key_scale) if x is not None]
    if not runs_eagerly(*operands):
        return False
    return not max(1.0, abs(call.scale)) * math.prod(map(_norm, operands)) < _LARGEST_LOGIT


def _norm(x: Tensor) -> float:
    return torch.linalg.vector_norm(x.detach(), dtype=torch.promote_types(x.dtype, torch.float32)).item()


def attention(call: AttentionCall) -> Tensor:
    """The output [B, Hq, Sq, Dv] of a call that `supports` accepts, differentiable by autograd.

    The scales are folded in q's dtype: exact to rounding in fp32 and fp64, while in bf16 q * query_scale and
    k * key_scale are rounded to bf16 once before they meet.
    """
    q, k, v, scale = call.q, call.k, call.v, call.query_scale
    wide = replace(call, q=q.float(), k=k.float(), v=v.float()) if _needs_fp32(call) else call
    if scale is None or call.visibility.is_full or not needs_graph(q, k, scale):
        out = _attention(wide)
    elif _starts_sharp(wide, scale):
        out = _first_rows_apart(wide)
    else:
        out = _attention(_without_lone_row(wide, scale))
    return out if wide is call else out.to(q.dtype)


def _attention(call: AttentionCall) -> Tensor:
    q, k, v, scale = _fold(call.q, call.query_scale), _fold(call.k, call.key_scale), call.v, call.scale
    mean_value = None
    is_narrow = q.dtype == torch.float32 and q.device.type == "cpu"
    if is_narrow and needs_graph(q, k, v) and _show_means(k, v):
        k, _ = _centred(k)
        v, mean_value = _centred(v)
    if scale <= 0:  # the kernel hides keys by -inf before it multiplies
        q, scale = q * (-1 if scale < 0 else 0), -scale or 1.0
    if not _SHARES_KEY_HEADS and q.shape[1] != k.shape[1]:
        k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], 1) for x in (k, v))
    width, value_width = max(q.shape[-1], v.shape[-1]), v.shape[-1]
    out = scaled_dot_product_attention(
        _for_kernel(q, width),
        _for_kernel(k, width),
        _for_kernel(v, width),
        scale=scale,
        is_causal=_as_bool(not call.visibility.is_full),
        enable_gqa=_as_bool(q.shape[1] != k.shape[1]),
    )
    out = out if value_width == width else out[..., :value_width]
    return out if mean_value is None else out + mean_value.repeat_interleave(q.shape[1] // mean_value.shape[1], 1)


def _first_rows_apart(call: AttentionCall) -> Tensor:
    """`_attention`, whose gradients of the first rows are those of a call in fp64."""
    rows = min(call.visibility.q_len, _FIRST_ROWS)
    operands = {name: getattr(call, name) for name in ("q", "k", "v", "query_scale", "key_scale")}
    parts = {name: first_rows.split(x, rows) for name, x in operands.items() if x is not None}
    out = _attention(replace(call, **{name: whole for name, (whole, _) in parts.items()}))
    first = {name: part.double() for name, (_, part) in parts.items()}
    narrow = replace(call, **first, visibility=Visibility.of(first["q"], first["k"], causal=True))
    return first_rows.join(out, _attention(_without_lone_row(narrow, first["query_scale"])).to(out.dtype))


def _starts_sharp(call: AttentionCall, scale: Tensor) -> bool:
    """Whether causal gradients of rows of few keys need care, scaled by row: in fp32, and with large factors.

    Scaled by 1 / n, those rows have the largest logits and gradients. In a sharp softmax dS = P (dP - delta) is a small
    difference, and PyTorch's kernel takes delta, the sum of P dP, from the output, rounded otherwise than dP is.
    """
    key_scale = call.key_scale
    if call.q.dtype == torch.float64 or call.q.device.type != "cpu":
        return False
    if not runs_eagerly(scale, key_scale):
        return True
    factor = call.scale * scale.detach()[:, :, 1:_FIRST_ROWS].abs().max().item()  # the first row has one key
    if key_scale is not None:
        factor *= key_scale.detach()[:, :, :_FIRST_ROWS].abs().max().item()
    return not abs(factor) <= _SHARP * call.q.shape[-1] ** -0.5


def _needs_fp32(call: AttentionCall) -> bool:
    """Whether PyTorch's kernel in the call's own 16 bits would be off by more than rounding its operands.

    A scaled q can leave the range of fp16: 1 / n of a long sequence is a subnormal. And gradients: PyTorch takes the
    softmax's derivative from a rounded output, an error that d_q has times the mean key, up to 8 bounds where keys and
    values have means of three times their spread, and d_query_scale times the mean logit. It sums those of a key head
    over the query heads of its group, and over blocks of 64 or 256 rows, in 16 bits.
    """
    is_scaled = call.query_scale is not None or call.key_scale is not None
    if call.q.dtype == torch.float16 and is_scaled:
        return True
    operands = (call.q, call.k, call.v, call.query_scale, call.key_scale)
    return call.q.dtype.itemsize == 2 and (is_scaled or call.q.device.type == "cpu") and needs_graph(*operands)


def _without_lone_row(call: AttentionCall, scale: Tensor) -> AttentionCall:
    """With query_scale 0 for the first causal row, for the sake of gradients: its softmax is 1, whatever the logit.

    So its gradients are 0, as they should be. PyTorch's kernel leaves rounding of them, which a scale that is large
    in this row, as 1 / n is, would lift above the gradients of all others.
    """
    return replace(call, query_scale=scale * (torch.arange(call.visibility.q_len, device=scale.device) > 0))


def _as_bool(condition: bool) -> bool:
    """A comparison of sizes as the bool that PyTorch's attention wants: under torch.compile it is a SymBool."""
    return True if condition else False


def _fold(x: Tensor, scale: Tensor | None) -> Tensor:
    return x if scale is None else apply(_Fold, x, scale)


def _show_means(k: Tensor, v: Tensor) -> bool:
    """Whether a look at some keys and values finds a head whose mean is large; True of those that cannot be read."""
    if not runs_eagerly(k, v):
        return True
    step = max(1, k.shape[2] // _SAMPLED_KEYS)
    samples = [x.detach()[:, :, ::step] for x in (k, v)]
    if k.shape[3] == v.shape[3]:  # one look at both takes half as long
        samples = [torch.cat(samples, dim=1)]
    return any(_is_large(x.mean(2, keepdim=True), x).any().item() for x in samples)


def _centred(x: Tensor) -> tuple[Tensor, Tensor | None]:
    """Keys or values [B, H, S, D] less their mean over S, [B, H, 1, D], and that: 0 in heads where it is small.

    As they are, and None, where it is small in all. A mean key changes no softmax, a mean value is added to the output,
    and neither changes a gradient: only what these lose. PyTorch takes delta = out . d_out from a rounded output, an
    error that d_q has times the mean key.
    """
    mean, is_large = _mean(x.detach())
    if runs_eagerly(x) and not is_large.any():
        return x, None
    mean = torch.where(is_large, mean, 0)
    return x - mean, mean


def _mean(x: Tensor) -> tuple[Tensor, Tensor]:
    """That of keys or values over S, [B, H, 1, D], and the heads, [B, H, 1, 1], where it is large, but not of giants.

    Taken from far smaller ones, of which a causal row may see no others, it would leave nothing but rounding.
    """
    mean = x.mean(2, keepdim=True)
    shortest = torch.linalg.vector_norm(x, dim=3, keepdim=True).amin(2, keepdim=True)
    is_near = torch.linalg.vector_norm(mean, dim=3, keepdim=True) <= _FAR * shortest
    return mean, _is_large(mean, x) & is_near


def _is_large(mean: Tensor, x: Tensor) -> Tensor:
    """Whether the mean over S holds much of a head's sum of squares, [B, H, 1, 1]; False of NaN and of inf."""
    of_mean, of_all = (torch.linalg.vector_norm(part, dim=(2, 3), keepdim=True) for part in (mean, x))
    return of_mean > (_LARGE_MEAN / x.shape[2]) ** 0.5 * of_all


def _for_kernel(x: Tensor, width: int) -> Tensor:
    """x with the head_dim and the strides that PyTorch's fast kernel takes.

    Of rows that overlap, as those of `unfold`, it reads memory that is none of theirs.
    """
    if x.shape[-1] < width:
        x = pad(x, (0, width - x.shape[-1]))  # which keeps an order of axes
    is_taken = x.stride(-1) == 1 and x.stride(-2) >= width
    return x if is_taken else x.clone(memory_format=torch.contiguous_format)


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
        with without_autocast(g):
            d_scale = torch.linalg.vecdot(g.to(scale.dtype), x.to(scale.dtype)) if needs_scale else None
        if not needs_x:
            return None, d_scale
        # The product is known to attention alone, so that its gradient is nobody else's: fresh memory takes longer.
        in_place = runs_eagerly(g, scale) and g.dtype == scale.dtype
        return g.mul_(scale[..., None]) if in_place else _times(g, scale), d_scale


def _times(x: Tensor, scale: Tensor) -> Tensor:
    # A result takes the layout of its first factor: a contiguous scale saves autograd a copy of the gradient.
    scale = scale.contiguous().unsqueeze(-1)
    if x.dtype == scale.dtype or x.device.type != "cpu" or not runs_eagerly(x, scale):
        out = scale * x
        # The compiler of torch 2.11 gives no gradient to a Function that returns a cast which changes nothing.
        return out if out.dtype == x.dtype else out.to(x.dtype)
    out = x.new_empty(x.shape)
    rows = max(1, _CACHED // out[:, :, 0].numel())
    for part, x_part, scale_part in zip(*(y.split(rows, 2) for y in (out, x, scale)), strict=True):
        part.copy_(x_part.to(scale.dtype).mul_(scale_part))
    return out
