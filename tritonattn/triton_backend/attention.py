"""From an AttentionCall to kernel launches: allocate, choose strides and grid, launch. No autograd, no policy."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ..call import AttentionCall, ForwardResult, Gradients
from ..launch import Arguments, is_wide, plan, stride_arguments
from ..tuning.config import ROW_TERMS_ALIGNMENT, Problem, TileConfig
from ..visibility import Visibility
from .key_statistics import seen_bytes


def forward(call: AttentionCall) -> ForwardResult:
    """out and lse by the forward kernel."""
    q, v, visible = call.q, call.v, call.visibility
    out = q.new_empty(*q.shape[:3], v.shape[-1])
    lse = q.new_empty(q.shape[:3], dtype=torch.float32)
    arguments = _call_arguments(call) | {"out_ptr": out, "lse_ptr": lse}
    _launch("forward", arguments, call, _row_programs(visible))
    return ForwardResult(out, lse)


def backward(
    call: AttentionCall, out: Tensor, lse: Tensor, d_out: Tensor, d_lse: Tensor | None, needs: Gradients
) -> Gradients:
    """Gradients by the row-terms, grad_query and grad_key_value kernels; `needs` holds a bool for each.

    out, lse as `forward` returned them; d_out [B, Hq, Sq, Dv] in q's dtype and d_lse fp32 [B, Hq, Sq], any strides.
    """
    shared = _call_arguments(call) | stride_arguments("d_out", d_out) | {"d_out_ptr": d_out}
    terms = _row_terms(call, shared, out, lse, d_lse)
    d_q = d_query_scale = d_k = d_v = d_key_scale = None
    visible = call.visibility
    if needs.q or needs.query_scale:
        d_q = torch.empty_like(call.q, memory_format=torch.contiguous_format)
        if needs.query_scale:
            d_query_scale = torch.empty_like(lse)
        results = {"d_q_ptr": d_q, "d_query_scale_ptr": d_query_scale}
        _launch("grad_query", shared | terms | results, call, _row_programs(visible))
    if needs.k or needs.v or needs.key_scale:
        d_k = torch.empty_like(call.k, memory_format=torch.contiguous_format)
        d_v = torch.empty_like(call.v, memory_format=torch.contiguous_format)
        if needs.key_scale:
            d_key_scale = torch.empty(call.k.shape[:3], dtype=torch.float32, device=call.k.device)
        results = {"d_k_ptr": d_k, "d_v_ptr": d_v, "d_key_scale_ptr": d_key_scale, "factor_size_ptr": None}
        if call.query_scale is not None:
            results["delta_ptr"] = terms["delta_factor_ptr"]
            if call.q.dtype == torch.float16:
                results["factor_size_ptr"] = _factor_size(terms["factor_ptr"], visible.kv_heads)
        _launch(
            "grad_key_value", shared | terms | results, call,
            lambda tile: -(-visible.k_len // tile.block_n) * visible.batch * visible.kv_heads,
        )  # fmt: skip
    asked = (needs.q, needs.k, needs.v, needs.query_scale, needs.key_scale)
    values = (d_q, d_k, d_v, d_query_scale, d_key_scale)
    return Gradients(*(value if ask else None for value, ask in zip(values, asked, strict=True)))


def _row_terms(call: AttentionCall, shared: Arguments, out: Tensor, lse: Tensor, d_lse: Tensor | None) -> Arguments:
    q_len = call.visibility.q_len
    terms_len = -(-q_len // ROW_TERMS_ALIGNMENT) * ROW_TERMS_ALIGNMENT
    count = 2 if call.query_scale is None else 4
    lse2, delta, *scaled = lse.new_empty((count, *lse.shape[:2], terms_len)).unbind(0)
    factor, delta_factor = scaled or (None, None)
    terms = {
        "lse2_ptr": lse2, "delta_ptr": delta, "factor_ptr": factor, "delta_factor_ptr": delta_factor,
        "terms_len": terms_len, "d_lse_ptr": None if d_lse is None else d_lse.contiguous(),
    }  # fmt: skip
    inputs = {"out_ptr": out.contiguous(), "lse_ptr": lse.contiguous()}
    heads = call.visibility.batch * call.visibility.q_heads
    _launch("row_terms", shared | terms | inputs, call, lambda tile: terms_len // tile.block_m * heads)
    return terms


def _factor_size(factor: Tensor, kv_heads: int) -> Tensor:
    """The largest |factor| of the query heads of each kv head: fp32 [B, Hkv]."""
    return factor.abs().amax(-1).unflatten(1, (kv_heads, -1)).amax(-1).contiguous()


def _launch(kernel: str, available: Arguments, call: AttentionCall, programs: Callable[[TileConfig], int]) -> None:
    problem = problem_of(call, query_scale_grad=available.get("d_query_scale_ptr") is not None)
    chosen = plan(kernel, problem, call.q.device)
    if kernel == "grad_key_value":
        available["row_bounds_ptr"] = None
        if call.visibility.key_ranges is not None:
            bounds = call.visibility.rows_of_key_blocks(chosen.config.block_n)
            available["row_bounds_ptr"] = bounds.expand(call.visibility.batch, -1, -1).contiguous()
    wide = is_wide(call.q, call.k, call.v, available.get("d_out_ptr"))
    chosen.launch(programs(chosen.config), available, wide)


def _row_programs(visible: Visibility) -> Callable[[TileConfig], int]:
    return lambda tile: -(-visible.q_len // tile.block_m) * visible.batch * visible.q_heads


def problem_of(call: AttentionCall, query_scale_grad: bool = False) -> Problem:
    """The parts of a call that select code."""
    visible = call.visibility
    return Problem(
        head_dim=call.q.shape[-1],
        value_dim=call.v.shape[-1],
        dtype=call.q.dtype,
        right=visible.right is not None,
        left=visible.left is not None,
        key_lengths=visible.key_lengths is not None,
        key_ranges=visible.key_ranges is not None,
        mask=visible.mask is not None,
        query_scale=call.query_scale is not None,
        key_scale=call.key_scale is not None,
        query_scale_grad=query_scale_grad,
        grouped=visible.q_heads != visible.kv_heads,
    )


def _call_arguments(call: AttentionCall) -> Arguments:
    """The arguments that the forward and both backward kernels share."""
    visible = call.visibility
    reach = visible.q_len + visible.k_len
    arguments = {
        "q_ptr": call.q, "k_ptr": call.k, "v_ptr": call.v,
        "query_scale_ptr": call.query_scale, "key_scale_ptr": call.key_scale,
        "scale": float(call.scale), "q_len": visible.q_len, "k_len": visible.k_len,
        "left": None if visible.left is None else min(visible.left, reach),
        "right": None if visible.right is None else min(visible.right, reach),
        "q_heads": visible.q_heads, "group": visible.q_heads // visible.kv_heads,
    }  # fmt: skip
    for name in ("q", "k", "v", "query_scale", "key_scale"):
        arguments |= stride_arguments(name, arguments[name + "_ptr"])
    return arguments | _visibility_arguments(call)


def _visibility_arguments(call: AttentionCall) -> Arguments:
    visible = call.visibility
    lengths, ranges, mask, seen = visible.key_lengths, visible.key_ranges, visible.mask, None
    if lengths is not None:
        lengths = lengths.clamp(0, visible.k_len).int().contiguous()
    if ranges is not None:
        ranges = ranges.int().contiguous()
    if mask is not None:
        mask = mask.expand(visible.batch, visible.q_heads, visible.q_len, visible.k_len).view(torch.uint8)
    if ranges is not None or mask is not None:
        seen = seen_bytes(visible.seen_keys(), call.k)
    arguments = {"key_lengths_ptr": lengths, "key_ranges_ptr": ranges, "mask_ptr": mask, "seen_ptr": seen}
    return arguments | stride_arguments("mask", mask)


