"""A checked call on an installed library of attention: refusals, operands as the library takes them, results."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.autograd.function import Function
from torch.nn.functional import pad

from ...core.autograd import apply, is_transformed, needs_graph, refuse_second_order
from ...core.call import AttentionCall, ForwardResult
from .fold import folded
from .libraries import HOW_TO_INSTALL, WIDEST, Library, card_of, libraries


def refuse_unsupported(call: AttentionCall) -> None:
    """Raise unless an installed library takes a call: NotImplementedError with the name of what it lacks.

    ImportError where none is installed; ValueError for tensors on no GPU.
    """
    _library_for(call)


def takes(call: AttentionCall, name: str) -> bool:
    """True where it is this library that runs a call on a GPU."""
    try:
        return _library_for(call).name == name
    except (NotImplementedError, ImportError):
        return False


def attention(call: AttentionCall) -> ForwardResult:
    """out [B, Hq, Sq, Dv], and with aux lse, of a call with the terms of its logits; max_logit and entropy are None."""
    library, terms, visible = _library_for(call), call.logits, call.visibility
    dtype, widths = call.v.dtype, library.widths(call.q.shape[3], call.v.shape[3], card_of(call.v.device))
    rows = None if visible.every_row_sees else visible.once("seeing rows", visible.seeing_rows)
    has_graph = needs_graph(*call.tensors)
    keys = visible.once("seen keys", visible.seen_keys) if has_graph and not visible.sees_every_key else None
    q = folded(call.q, call.wide_q, terms.query_scale, rows if has_graph else None, dtype)
    k = folded(call.k, call.wide_k, terms.key_scale, keys, dtype)
    v = folded(call.v, None, None, keys, dtype)
    scale = terms.scale
    if scale <= 0:  # libraries take the maximum of a row before they multiply
        q, scale = q * (-1 if scale < 0 else 0), -scale or 1.0
    is_packed = visible.sequences is not None
    q, k, v = (_as_taken(x, width, is_packed) for x, width in ((q, widths[0]), (k, widths[0]), (v, widths[1])))
    out, lse = library.attend(q, k, v, call, float(scale), terms.sinks)
    if out.requires_grad:
        refuse_second_order(out)
    out = (out[None] if is_packed else out)[..., : call.v.shape[3]].transpose(1, 2)
    if rows is not None:  # rows of no sequence are not written
        out = torch.where(rows[..., None], out, 0)
    return ForwardResult(out, _lse(lse, rows, call, library))  # pyright: ignore[reportArgumentType]


def _library_for(call: AttentionCall) -> Library:
    card = card_of(call.q.device)
    if (obstacle := _obstacle(call)) is not None:
        raise _refusal(obstacle)
    found = libraries(card)
    obstacles = []
    for library in found:
        obstacles.append(library.obstacle(call))
        if obstacles[-1] is None:
            return library
    if not found:
        raise ImportError(
            f"backend: 'flash' needs FlashAttention, which is not installed for this GPU: {HOW_TO_INSTALL}"
        )
    raise _refusal(str(obstacles[0]), f" by {found[0].name}" + (f"; {HOW_TO_INSTALL}" if len(found) == 1 else ""))


def _refusal(what: str, by: str = "") -> NotImplementedError:
    return NotImplementedError(
        f"{what}: backend 'flash' does not support it{by}; backends 'triton', 'sdpa' and 'reference' do"
    )


def _obstacle(call: AttentionCall) -> str | None:
    """Name what a call asks for and no library has, or None."""
    visible, dims = call.visibility, (call.q.shape[3], call.v.shape[3])
    if call.v.dtype.itemsize != 2:
        return f"q of dtype {call.v.dtype}"
    if max(dims) > WIDEST:
        return f"head_dim {max(dims)}, above {WIDEST}"
    for name, value in (
        (call.cached, call.cached or None),
        ("key_lengths", visible.key_lengths),
        ("key_ranges", visible.key_ranges),
        ("mask", visible.mask),
        ("key_bias", call.logits.key_bias),
        ("bias", call.logits.bias),
        ("relative_bias", call.logits.relative_bias),
        ("dropout_p", call.dropout_p or None),
        ("batch_invariant", visible.invariant or None),
        ("return_aux with sinks", call.logits.sinks if call.aux else None),
        ("torch.func", is_transformed() or None),
    ):
        if value is not None:
            return name
    return None


def _as_taken(x: Tensor, width: int, is_packed: bool) -> Tensor:
    """x [B, H, S, D] as [B, S, H, width], or [S, H, width] of packed sequences, in rows of 16 aligned bytes."""
    x = x.transpose(1, 2)
    x = x[0] if is_packed else x
    if x.shape[-1] < width:
        return pad(x, (0, width - x.shape[-1])).contiguous()
    *outer, last = x.stride()
    is_aligned = last == 1 and not any(n % 8 for n in (x.storage_offset(), *outer))
    return x if is_aligned else x.contiguous()


def _lse(lse: Tensor | None, rows: Tensor | None, call: AttentionCall, library: Library) -> Tensor | None:
    """lse as [B, Hq, Sq], -inf in rows without keys, of [B, Hq, Sq] or [Hq, T_q]."""
    if lse is None:
        return None
    found = lse.reshape(call.visibility.rows)
    if not library.has_gradient_of_lse:
        found = apply(_WithoutGradient, found, library.name)
    return found if rows is None else found.masked_fill(~rows, -math.inf)


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
            f"return_aux: {ctx.name} has no gradient of lse; flash-attn-4 and backend 'triton' have"
        )
