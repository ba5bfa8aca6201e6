"""A checked call on an installed library of attention: refusals, operands as the library takes them, results."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import Function
from torch.nn.functional import pad

from ...core.autograd import apply, first_order, needs_graph, no_second_order, refused
from ...core.call import AttentionCall, ForwardResult, Request
from ...core.terms import sinks_of_heads
from ..protocol import Attend
from .libraries import FLASH, HOW_TO_INSTALL, Library, card_of, libraries, why_none
from .obstacles import lse_has_gradient, obstacle, obstacle_of_all

_NAME = "backend 'flash'"


def refuse_unsupported(request: Request) -> None:
    """Raise unless an installed library takes a request: NotImplementedError with the name of what it lacks.

    ImportError where none is installed; ValueError for tensors on no GPU.
    """
    _library_for(request, needs_graph(*request.tensors()))


def takes(request: Request, name: str) -> bool:
    """True where it is this library that runs a request on a GPU, with gradients where grad mode is on."""
    try:
        return _library_for(request, torch.is_grad_enabled()).name == name
    except (NotImplementedError, ImportError):
        return False


def attention(call: AttentionCall, again: Attend) -> ForwardResult:
    """out [B, Hq, Sq, Dv], and with aux lse, of a call with the terms of its logits; max_logit and entropy are None."""
    has_graph, card = needs_graph(*call.tensors()), card_of(call.v.device)
    library, terms, visible = _library_for(call, has_graph), call.terms, call.visibility
    is_grouped, is_packed = visible.q_heads != visible.kv_heads, visible.sequences is not None
    dtype, widths = call.v.dtype, library.widths((call.q.shape[3], call.v.shape[3]), card, is_grouped)
    rows = None if visible.every_row_attends else visible.attending_rows()
    keys = None if visible.attends_to_every_key else visible.seen_keys()
    q = folded(call.q, terms.query_scale, rows if has_graph else None, dtype)
    k = folded(call.k, terms.key_scale, keys, dtype)
    v = folded(call.v, None, keys, dtype)
    scale = terms.scale
    if scale <= 0:  # libraries take the maximum of a row before they multiply
        q, scale = q * (-1 if scale < 0 else 0), -scale or 1.0
    q, k, v = (_as_taken(x, width, is_packed) for x, width in ((q, widths[0]), (k, widths[0]), (v, widths[1])))
    sinks = None if terms.sinks is None else sinks_of_heads(terms.sinks)
    out, lse = library.attend(q, k, v, call, float(scale), sinks)
    if out.grad_fn is not None:
        out.register_hook(_aligned)
        out.grad_fn.register_hook(_refuse_where_recorded)
    out = (out[None] if is_packed else out)[..., : call.v.shape[3]].transpose(1, 2)
    if rows is not None:  # rows of no sequence are not written
        out = torch.where(rows[..., None], out, 0)
    if lse is not None:
        lse = lse.reshape(visible.rows)
        lse = lse if lse_has_gradient(library, call, card) else apply(_WithoutGradient, lse, library.name)
        lse = lse if rows is None else lse.masked_fill(~rows, -math.inf)
    return ForwardResult(out, lse)  # pyright: ignore[reportArgumentType]


def folded(x: Tensor, scale: Tensor | None, seen: Tensor | None, dtype: torch.dtype) -> Tensor:
    """x [B, H, S, D] times scale [B, H, S], computed in fp32 and rounded to dtype once.

    x      may hold values of dtype in fp32; its gradient is then fp32
    seen   bool, broadcastable to [B, H, S]: the result and gradients are 0 elsewhere, whatever x holds there and a
           library leaves there; None: all
    """
    if scale is None and seen is None:
        return x if x.dtype == dtype else x.to(dtype)
    return apply(_Fold, x, scale, seen, dtype)


class _Fold(Function):
    """y = x * scale. With a gradient d of y in 16 bits: d_x = d * scale, d_scale = sum_D d * x, both in fp32."""

    @staticmethod
    def forward(x, scale, seen, dtype):
        if scale is not None:
            x = torch.mul(x, scale[..., None], out=torch.empty_like(x, dtype=dtype))
        return x if seen is None else torch.where(seen[..., None], x, 0).to(dtype)

    @staticmethod
    def setup_context(ctx, inputs, output) -> None:
        x, scale, seen, _ = inputs
        ctx.dtype = x.dtype
        ctx.save_for_backward(None if scale is None else x, scale, seen)

    @staticmethod
    @first_order(_NAME)
    def backward(ctx, saved, d):
        x, scale, seen = saved
        d_x = d_scale = None
        needs_x, needs_scale, *_ = ctx.needs_input_grad
        if needs_scale:
            d_scale = (d.float() * x).sum(-1)
            d_scale = d_scale if seen is None else torch.where(seen, d_scale, 0)
        if needs_x:
            d_x = d.to(ctx.dtype) if scale is None else (d * scale[..., None]).to(ctx.dtype)
            d_x = d_x if seen is None else torch.where(seen[..., None], d_x, 0)
        return d_x, d_scale, None, None


def _library_for(call: Request | AttentionCall, has_graph: bool) -> Library:
    card = card_of(call.q.device)
    if (of_all := obstacle_of_all(call)) is not None:
        raise _refusal(of_all)
    found = libraries(card)
    obstacles = []
    for library in found:
        obstacles.append(obstacle(library, call, card, has_graph))
        if obstacles[-1] is None:
            return library
    if not any(card in cards for _, _, cards, *_ in FLASH):
        raise _refusal(f"compute capability {card}.x")
    if not found:
        raise ImportError(f"backend: 'flash' needs FlashAttention, {why_none(card)}: {HOW_TO_INSTALL}")
    raise _refusal(str(obstacles[0]), f" by {found[0].name}" + (f"; {HOW_TO_INSTALL}" if len(found) == 1 else ""))


def _refusal(what: str, by: str = "") -> NotImplementedError:
    return NotImplementedError(
        f"{what}: backend 'flash' does not support it{by}; backend 'auto' does, by 'triton' or 'sdpa'"
    )


def _as_taken(x: Tensor, width: int, is_packed: bool) -> Tensor:
    """x [B, H, S, D] as [B, S, H, width], or [S, H, width] of packed sequences, in rows of 16 aligned bytes."""
    x = x.transpose(1, 2)
    x = x[0] if is_packed else x
    return _aligned(pad(x, (0, width - x.shape[-1])) if x.shape[-1] < width else x)


def _refuse_where_recorded(results: tuple[Tensor | None, ...], gradients: tuple[Tensor | None, ...]) -> Any:
    return refused(no_second_order(_NAME), results, gradients) if torch.is_grad_enabled() else None


def _aligned(x: Tensor) -> Tensor:
    """x in rows of 16 aligned bytes, from which the libraries load without a check: gradients of out too."""
    *outer, last = x.stride()
    is_aligned = last == 1 and not any(n % 8 for n in (x.storage_offset(), *outer))
    return x if is_aligned else x.clone(memory_format=torch.contiguous_format)  # axes of one entry keep no odd stride


class _WithoutGradient(Function):
    """lse, whose gradient a library drops without a word."""

    @staticmethod
    def forward(lse, name):
        return lse.view_as(lse)

    @staticmethod
    def setup_context(ctx, inputs, output) -> None:
        ctx.name = inputs[1]

    @staticmethod
    def backward(ctx, d_lse):
        raise NotImplementedError(
            f"return_aux: {ctx.name} has no gradient of lse here; backends 'triton', 'sdpa' and 'reference' have"
        )
