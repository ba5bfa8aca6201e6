"""From an AttentionCall to kernel launches: allocate, choose strides, grid and config, call. No autograd, no policy."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .call import AttentionCall, ForwardResult, Gradients
from .kernels import KERNELS
from .tuning.compile import constexpr_values
from .tuning.config import ROW_TERMS_ALIGNMENT, Problem, Target, TileConfig
from .tuning.defaults import default_config
from .visibility import Visibility

Arguments = dict[str, Any]
Grid = tuple[int, ...]


def run_on_device(kernel: Any, grid: Grid, arguments: Arguments, config: TileConfig) -> None:
    """Compile where needed and launch, on the device of the tensors."""
    device = next(value.device for value in arguments.values() if isinstance(value, Tensor))
    if device.type != "cuda":
        kernel[grid](**arguments, num_warps=config.num_warps, num_stages=config.num_stages)
        return
    with torch.cuda.device(device):
        kernel[grid](**arguments, num_warps=config.num_warps, num_stages=config.num_stages)


def run_interpreted(kernel: Any, grid: Grid, arguments: Arguments, config: TileConfig) -> None:
    """Launch under TRITON_INTERPRET=1 with bf16 widened to fp32, and round the results back to nearest even.

    Triton's interpreter computes on the raw bits of bf16 and truncates when it converts (triton issues 11584, 11604).
    What is lost: P and dS are not rounded to bf16, so an interpreted result is closer to exact than a GPU's.
    """
    wide = {name: _widened(value) for name, value in arguments.items() if _is_bfloat16(value)}
    kernel[grid](**(arguments | wide))
    for name, value in wide.items():
        if not name.startswith(_READ_ONLY):
            arguments[name].copy_(value)


config_for = default_config

# Every kernel call passes `run`; a test may put another executor of the same signature here.
interpreting = os.environ.get("TRITON_INTERPRET", "0") == "1"
run: Callable[[Any, Grid, Arguments, TileConfig], None] = run_interpreted if interpreting else run_on_device

_READ_ONLY = ("q_ptr", "k_ptr", "v_ptr", "d_out_ptr")


def runs_on(device: torch.device) -> bool:
    """Whether kernels can be run on tensors of this device: a GPU, or any where the executor is not the GPU's own."""
    return device.type == "cuda" or run is not run_on_device


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
    shared = _call_arguments(call) | _stride_arguments("d_out", d_out) | {"d_out_ptr": d_out}
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


def key_statistics(k: Tensor, seen: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """Lengths of keys and fp64 prefix sums of lengths and squared lengths, K read once.

    k [B, Hkv, Sk, D]; seen bool, broadcastable to [B, Hkv, Sk], or None. Returns fp32 [B, Hkv, Sk] and fp64
    [B, Hkv, Sk + 1] twice; unseen keys count 0.
    """
    lengths = torch.empty(k.shape[:3], dtype=torch.float32, device=k.device)
    prefix = (*k.shape[:2], k.shape[2] + 1)
    length_prefix, square_prefix = (torch.empty(prefix, dtype=torch.float64, device=k.device) for _ in range(2))
    arguments = _key_arguments(k, seen) | {"lengths_ptr": lengths}
    _launch_keys("key_statistics", arguments, k)
    sums = {"lengths_ptr": lengths, "length_prefix_ptr": length_prefix, "square_prefix_ptr": square_prefix}
    _launch_keys("key_prefix_sums", sums | {"k_len": k.shape[2]}, k)
    return lengths, length_prefix, square_prefix


def key_statistics_backward(k: Tensor, seen: Tensor | None, lengths: Tensor, d_lengths: Tensor) -> Tensor:
    """d_k [B, Hkv, Sk, D] from the lengths that `key_statistics` returned and their gradient, fp32 [B, Hkv, Sk]."""
    d_k = torch.empty_like(k, memory_format=torch.contiguous_format)
    gradients = {"lengths_ptr": lengths.contiguous(), "d_lengths_ptr": d_lengths.contiguous(), "d_k_ptr": d_k}
    _launch_keys("key_statistics_grad", _key_arguments(k, seen) | gradients, k)
    return d_k


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
    plan = _plan(kernel, problem, Target.of(call.q.device), config_for)
    if kernel == "grad_key_value":
        available["row_bounds_ptr"] = None
        if call.visibility.key_ranges is not None:
            bounds = call.visibility.rows_of_key_blocks(plan.config.block_n)
            available["row_bounds_ptr"] = bounds.expand(call.visibility.batch, -1, -1).contiguous()
    wide = _is_wide(call.q, call.k, call.v, available.get("d_out_ptr"))
    run(plan.kernel, (programs(plan.config),), plan.arguments(available, wide), plan.config)


def _row_programs(visible: Visibility) -> Callable[[TileConfig], int]:
    return lambda tile: -(-visible.q_len // tile.block_m) * visible.batch * visible.q_heads


def _launch_keys(kernel: str, available: Arguments, k: Tensor) -> None:
    batch, heads, k_len, head_dim = k.shape
    plan = _plan(kernel, Problem(head_dim, head_dim, k.dtype), Target.of(k.device), config_for)
    blocks = 1 if kernel == "key_prefix_sums" else -(-k_len // plan.config.block_n)
    run(plan.kernel, (blocks * batch * heads,), plan.arguments(available, _is_wide(k)), plan.config)


class _Plan(NamedTuple):
    """What a kernel's launches of one problem share."""

    kernel: Callable
    config: TileConfig
    names: tuple[str, ...]
    constexprs: Arguments

    def arguments(self, available: Arguments, wide: bool) -> Arguments:
        """The kernel's own arguments, in its order."""
        values = {**available, **self.constexprs, "WIDE": wide}
        return {name: values[name] for name in self.names}


@functools.lru_cache(maxsize=4096)
def _plan(kernel: str, problem: Problem, target: Target, config_of: Callable) -> _Plan:
    function, config = KERNELS[kernel], config_of(kernel, problem, target)
    return _Plan(function, config, tuple(function.arg_names), constexpr_values(problem, config))


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
        arguments |= _stride_arguments(name, arguments[name + "_ptr"])
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
        seen = _seen_bytes(visible.seen_keys(), call.k)
    arguments = {"key_lengths_ptr": lengths, "key_ranges_ptr": ranges, "mask_ptr": mask, "seen_ptr": seen}
    return arguments | _stride_arguments("mask", mask)


def _key_arguments(k: Tensor, seen: Tensor | None) -> Arguments:
    arguments = {"k_ptr": k, "seen_ptr": None if seen is None else _seen_bytes(seen, k)}
    return arguments | _stride_arguments("k", k) | {"k_len": k.shape[2], "kv_heads": k.shape[1]}


def _seen_bytes(seen: Tensor, k: Tensor) -> Tensor:
    return seen.expand(k.shape[:3]).contiguous().view(torch.uint8)


_STRIDE_NAMES = {
    name: tuple(f"{name}_stride_{axis}" for axis in axes)
    for axes, names in (("bhsd", "q k v d_out"), ("bhs", "query_scale key_scale"), ("bhqk", "mask"))
    for name in names.split()
}


def _stride_arguments(name: str, tensor: Tensor | None) -> Arguments:
    names = _STRIDE_NAMES[name]
    return dict.fromkeys(names, 1) if tensor is None else dict(zip(names, tensor.stride(), strict=True))


def _is_wide(*tensors: Tensor | None) -> bool:
    """Whether offsets inside one tile can pass 2^31: no tile has more than 1024 rows."""
    return any(x is not None and 1024 * x.stride(2) + x.shape[3] * x.stride(3) >= 2**31 for x in tensors)


def _is_bfloat16(value: Any) -> bool:
    return isinstance(value, Tensor) and value.dtype == torch.bfloat16


def _widened(tensor: Tensor) -> Tensor:
    """An fp32 copy with the same strides, shared elements of expanded tensors included."""
    extent = 1 + sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    flat = tensor.as_strided((max(extent, 0),), (1,)).float()
    return flat.as_strided(tensor.shape, tensor.stride(), 0)
