"""Ahead-of-time compilation: any kernel, any target, no GPU."""

from __future__ import annotations

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, CompiledKernel

from ..kernels import KERNELS
from .config import Problem, Target, TileConfig, corrects_delta, legal_reasons, padded_dim, sum_columns
from .defaults import default_config

_SCALAR_TYPES = {"torch.float16": "fp16", "torch.bfloat16": "bf16", "torch.float32": "fp32"}
WIDEST = 256  # head dim
_OPTIONAL = (
    "key_lengths",
    "key_ranges",
    "mask",
    "query_scale",
    "key_scale",
    "left",
    "right",
    "softcap",
    "sinks",
    "dropout",
    "block_table",
)
_POINTER_TYPES = {
    "key_lengths": "i32",
    "cache_lengths": "i32",
    "block_table": "i32",
    "key_ranges": "i32",
    "row_bounds": "i32",
    "q_starts": "i32",
    "k_starts": "i32",
    "mask": "u8",
    "seen": "u8",
    "dropout": "i64",
    "bounds": "i32",
    "sums": "fp64",
    "length_sums": "fp64",
    "square_sums": "fp64",
    "counts": "i64",
    "counts_after": "i64",
    "keys_seen": "u8",
    "lo": "i64",
    "hi": "i64",
    "argmax": "i64",
}
_DATA_POINTERS = ("q", "k", "v", "out", "rounding", "d_out", "d_q", "d_k", "d_v")


def compile_kernel(
    kernel: str, problem: Problem, config: TileConfig | None = None, target: str | Target = "sm_80"
) -> CompiledKernel:
    """Compile a kernel for a target on any machine: Triton's CompiledKernel (`.asm`, `.metadata`).

    kernel    a name in `tritonattn.kernels.KERNELS`: forward, grad_query, grad_key_value, key_statistics, ...
    config    None takes `default_config`
    target    "sm_90", "gfx942", ... or a Target

    The specialisation is that of an aligned call: pointers, strides and alignments as for contiguous tensors whose head
    dims are multiples of 16. Raises ValueError for an unknown kernel or target, a problem that kernels do not solve
    (head dims above 256, fp64) and a config that is not legal.

    >>> import torch
    >>> from tritonattn.tuning import Problem, compile_kernel
    >>> compile_kernel("forward", Problem(64, 64, torch.bfloat16), target="sm_90").metadata.num_warps
    4
    """
    if kernel not in KERNELS:
        raise ValueError(f"kernel: expected one of {', '.join(KERNELS)}, got {kernel!r}")
    dims = (problem.head_dim, problem.value_dim)
    if not all(1 <= dim <= WIDEST for dim in dims) or str(problem.dtype) not in _SCALAR_TYPES:
        raise ValueError(
            f"problem: expected head dims from 1 to {WIDEST} and fp16, bf16 or fp32, got {dims} and {problem.dtype}"
        )
    target = Target.parse(target) if isinstance(target, str) else target
    config = default_config(kernel, problem, target) if config is None else config
    reasons = legal_reasons(kernel, config, problem, target)
    if reasons:
        raise ValueError(f"config: expected a legal one for {kernel}, got {config}: {'; '.join(reasons)}")
    function = KERNELS[kernel]
    signature, constants, attributes = specialisation(function, problem, config, target)
    warp_size = 64 if target.arch.startswith("gfx9") else 32  # CDNA; RDNA and NVIDIA have 32
    arch = int(target.arch) if target.backend == "cuda" else target.arch
    return triton.compile(
        ASTSource(function, signature, constants, attributes),
        target=GPUTarget(target.backend, arch, warp_size),
        options=compile_options(config),
    )


def compile_options(config: TileConfig) -> dict:
    """What Triton is told beside a kernel's arguments.

    Every multiply-add that counts is written as one, whatever Triton fuses by default; but 3.9 warns who does not say.
    """
    return {"num_warps": config.num_warps, "num_stages": config.num_stages, "enable_fp_fusion": True}


def specialisation(function, problem: Problem, config: TileConfig, target: Target) -> tuple[dict, dict, dict]:
    """Types, constants and alignments of a kernel's arguments, by the grammar of their names.

    `*_ptr` is a pointer, `*_stride_*` a stride, CAPITALS a constexpr; an optional tensor that the problem lacks is the
    constant None, and so is the unit stride of an inner axis the constant 1.
    """
    constexprs = constexpr_values(problem, config, target)
    signature, constants, attributes = {}, {}, {}
    for position, name in enumerate(function.arg_names):
        if name in constexprs:
            signature[name], constants[name] = "constexpr", constexprs[name]
            continue
        argument_type = _argument_type(name, problem, config)
        signature[name] = "constexpr" if argument_type in (None, 1) else argument_type
        if argument_type in (None, 1):
            constants[name] = argument_type
        elif name.endswith("_ptr") or "_stride_" in name:
            attributes[(position,)] = [["tt.divisibility", 16]]
    return signature, constants, attributes


def constexpr_values(problem: Problem, config: TileConfig, target: Target) -> dict:
    """The constexprs that kernels take from a problem, a config and a target."""
    return {
        "HEAD_DIM": problem.head_dim,
        "VALUE_DIM": problem.value_dim,
        "BLOCK_D": padded_dim(problem.head_dim),
        "BLOCK_DV": padded_dim(problem.value_dim),
        "BLOCK_M": config.block_m,
        "BLOCK_N": config.block_n,
        "SUM_COLUMNS": sum_columns(problem, target),
        "CORRECT_DELTA": corrects_delta(problem.dtype),
        "SPLIT_TERMS": target.has_tensor_memory,
        "PRECISION": "ieee",
        "WIDE": False,
    }


def _argument_type(name: str, problem: Problem, config: TileConfig) -> str | int | None:
    """A Triton type, 1 for a unit stride, or None for an argument that the problem lacks."""
    if name.endswith("_descriptor"):
        return _descriptor_type(name, problem, config) if config.descriptors else None
    for part in _OPTIONAL:
        if (name == part or name.startswith((part + "_ptr", part + "_stride"))) and not getattr(problem, part):
            return None if not name.startswith(part + "_stride") else 1
    stem = name.removesuffix("_ptr")
    lacks = {
        "d_query_scale": not problem.query_scale_grad,
        "factor_size": not (problem.query_scale and str(problem.dtype) == "torch.float16"),
        "key_size": not (problem.key_scale and str(problem.dtype) == "torch.float16"),
        "d_key_scale": not problem.key_scale,
        "row_bounds": not problem.key_ranges,
        "seen": not (problem.key_ranges or problem.mask),
        "d_lse": True,
        "new_counts": True,
        "new_lengths": True,
        "added": True,
        "rounding": problem.dtype.itemsize != 2,
        "d_sinks": not problem.sinks,
        "q_starts": not problem.sequences,
        "k_starts": not problem.sequences,
        "max_logit": not problem.aux,
        "entropy": not problem.aux,
        "split_max_logit": not problem.aux,
        "split_entropy": not problem.aux,
    }
    if lacks.get(stem):
        return None
    if name.endswith("_ptr"):
        if stem in _DATA_POINTERS:
            return "*" + _SCALAR_TYPES[str(problem.dtype)]
        return "*i64" if stem == "terms" and problem.query_scale else "*" + _POINTER_TYPES.get(stem, "fp32")
    if "_stride_" in name:
        unit = name.endswith("_stride_d") or name in ("query_scale_stride_s", "key_scale_stride_s", "mask_stride_k")
        return 1 if unit else "i32"
    if name == "group" and not problem.grouped:
        return 1
    return "fp32" if name in ("scale", "softcap", "keep_scale") else "i32"


def _descriptor_type(name: str, problem: Problem, config: TileConfig) -> str:
    """Blocks of the streamed operand: keys in the passes over keys, rows in the pass over rows."""
    rows = config.block_n if name in ("k_descriptor", "v_descriptor") else config.block_m
    width = problem.head_dim if name in ("q_descriptor", "k_descriptor") else problem.value_dim
    return f"tensordesc<{_SCALAR_TYPES[str(problem.dtype)]}[1, 1, {rows}, {padded_dim(width)}]>"
