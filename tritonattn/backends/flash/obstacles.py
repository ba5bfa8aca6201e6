"""Calls that a library cannot run, by name.

Versions differ in their keywords: a call is refused where a function's signature lacks the keyword that it needs. The
rest is read from the code of FlashAttention 2.8.3, of 3 at commit 0251105, and of 4.0.0b36, by card.
"""

from __future__ import annotations

import torch
from torch.backends.cuda import SDPAParams, can_use_cudnn_attention
from torch.nn.attention import SDPBackend, sdpa_kernel

from ...core.autograd import in_forward_mode, is_transformed
from ...core.call import AttentionCall, Request
from ...core.terms import Terms, given, sinks_of_heads
from ...core.visibility import Visibility
from .libraries import CUDNN, KEYWORDS_OF_LSE, WIDEST, Library, lengths, limits

_TERMS = ("query_scale", "key_scale", "sinks", "softcap")


def obstacle_of_all(call: Request | AttentionCall) -> str | None:
    """Name what a call asks for and no library has, or None."""
    visible, dims = call.visibility, (call.q.shape[3], call.v.shape[3])
    cached, drops = (call.cached, call.dropout_p > 0) if isinstance(call, Request) else ("", False)
    lacked = next((name for name in given(call.terms) if name not in _TERMS), "")
    if call.v.dtype.itemsize != 2:
        return f"q of dtype {call.v.dtype}"
    if max(dims) > WIDEST:
        return f"head_dim {max(dims)}, above {WIDEST}"
    for name, value in (
        (cached, cached or None),
        ("key_lengths", visible.key_lengths),
        ("key_ranges", visible.key_ranges),
        ("mask", visible.mask),
        (lacked, lacked or None),
        ("dropout_p", drops or None),
        ("batch_invariant", visible.invariant or None),
        ("return_aux with sinks", call.terms.sinks if call.aux else None),
        ("sinks of rows", _has_sinks_of_rows(call.terms) or None),
        ("torch.func", is_transformed() or None),
        ("a tangent of forward mode", in_forward_mode() or None),
    ):
        if value is not None:
            return name
    return None


def _has_sinks_of_rows(terms: Terms) -> bool:
    return terms.sinks is not None and sinks_of_heads(terms.sinks) is None


def obstacle(library: Library, call: Request | AttentionCall, card: int, has_graph: bool) -> str | None:
    """Name what a call asks for and a library lacks on a card, or None.

    has_graph   gradients are asked for
    """
    visible, terms, keywords = call.visibility, call.terms, library.keywords
    window, softcap, sinks = _has_window(visible), terms.softcap is not None, terms.sinks is not None
    for name, is_asked, keyword in (
        ("window", window, "window_size"),
        ("softcap", softcap, "softcap"),
        ("sinks", sinks, "learnable_sink"),
    ):
        if is_asked and keyword not in keywords:
            return name
    if call.aux and not keywords.intersection(KEYWORDS_OF_LSE):
        return "return_aux"
    if library is CUDNN:
        return _obstacle_of_cudnn(call, has_graph)
    if library.name == "flash-attn-2":
        if softcap and card == 0:
            return "softcap on AMD"  # ignored there without a word
        return _obstacle_of_window(visible) if window else None
    if has_graph and torch.are_deterministic_algorithms_enabled() and not _can_be_deterministic(library, call, card):
        return "gradients under torch.use_deterministic_algorithms"
    return _obstacle_of_four(call, card, has_graph) if library.name == "flash-attn-4" else None


def lse_has_gradient(library: Library, call: Request | AttentionCall, card: int) -> bool:
    return "return_lse" in library.keywords and not _is_widest_of_blackwell(call, card)


def _can_be_deterministic(library: Library, call: Request | AttentionCall, card: int) -> bool:
    if library.name == "flash-attn-3":
        return max(call.q.shape[3], call.v.shape[3]) <= 192
    return library.name != "flash-attn-4" or card != 12


def _has_window(visible: Visibility) -> bool:
    left, right = limits(visible)
    return left is not None or right not in (None, 0)


def _obstacle_of_four(call: Request | AttentionCall, card: int, has_graph: bool) -> str | None:
    terms, widest = call.terms, max(call.q.shape[3], call.v.shape[3])
    window, softcap, sinks = _has_window(call.visibility), terms.softcap is not None, terms.sinks is not None
    if card == 12:  # 99 KiB of shared memory
        found = {f"head_dim {widest}, above 128": widest > 128, "sinks": sinks, "softcap with gradients": softcap}
        found["softcap with gradients"] &= has_graph
    elif has_graph and _is_widest_of_blackwell(call, card):
        found = {"window": window, "softcap": softcap, "sinks": sinks}
        found = {f"{name} with gradients at head_dim {widest}": is_asked for name, is_asked in found.items()}
    else:
        return None
    return next((name for name, is_asked in found.items() if is_asked), None)


def _is_widest_of_blackwell(call: Request | AttentionCall, card: int) -> bool:
    dims = call.q.shape[3], call.v.shape[3]
    return card in (10, 11) and max(dims) > 128 and dims != (192, 128)


def _obstacle_of_window(visible: Visibility) -> str | None:
    """FlashAttention 2 takes a right side from Sk on for no limit, and none with a left side for Sk."""
    (q_len, k_len), (left, right) = lengths(visible), limits(visible)
    is_other = left is not None if right is None else right >= k_len
    return f"window of up to {q_len} queries and {k_len} keys" if is_other and q_len > k_len + 1 else None


def _obstacle_of_cudnn(call: Request | AttentionCall, has_graph: bool) -> str | None:
    visible = call.visibility
    if visible.sequences is not None:
        return "cu_seqlens_q (packed sequences)"
    is_causal, is_grouped = limits(visible)[1] == 0, visible.q_heads != visible.kv_heads
    if is_causal and visible.q_len != visible.k_len:
        return f"causal of {visible.q_len} queries and {visible.k_len} keys"  # its mask is top-left
    width, like = CUDNN.widths((call.q.shape[3], call.v.shape[3]), 0, is_grouped)[0], call.v
    operands = [
        x
        if (x.dtype, x.shape[3]) == (like.dtype, width)
        else like.new_empty(*x.shape[:3], width, requires_grad=has_graph)
        for x in (call.q, call.k, call.v)
    ]
    with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
        q, k, v = operands
        if can_use_cudnn_attention(SDPAParams(q, k, v, None, 0.0, is_causal, is_grouped)):
            return None
    return f"q {list(call.q.shape)} and k {list(call.k.shape)} of {like.dtype}"
