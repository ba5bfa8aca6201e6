"""Ahead-of-time compilation: launches are built on tensors without memory, recorded, and compiled, without a GPU."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, CompiledKernel, make_backend
from triton.runtime.jit import JITFunction, find_paths_if, get_iterable_path

from ...core.call import AttentionCall, Logits, Needs
from ...core.dropout import Dropout
from ...core.sequences import Sequences
from ...core.visibility import Visibility
from ...kernels import KERNELS
from ...tuning.config import WIDEST, WIDEST_KEYS, Problem, Target, TileConfig, legal_reasons
from ...tuning.defaults import default_config
from .attention import backward, forward
from .decode import Rows, attend
from .device import binder, compile_options
from .key_statistics import append_keys, append_to_pages, key_lengths, key_lengths_backward
from .launch import Launch, overriding, recording
from .ranges import argmax_over_ranges, prefix_sums, range_arguments, rows_of_key_blocks, seen_keys

_PAGE = 16
_DTYPES = (torch.float16, torch.bfloat16, torch.float32)


def compile_kernel(
    kernel: str, problem: Problem, config: TileConfig | None = None, target: str | Target = "sm_80"
) -> CompiledKernel:
    """Compile a kernel for a target on any machine: Triton's CompiledKernel (`.asm`, `.metadata`).

    kernel    a name in `tritonattn.kernels.KERNELS`: forward, grad_query, grad_key_value, key_statistics, ...
    config    None takes `default_config`
    target    "sm_90", "gfx942", ... or a Target

    The code is that of a launch, which finds it in Triton's cache: of a call with contiguous tensors (where the problem
    is not `aligned`, with rows of an odd stride) of several thousand keys, or, where it is `short`, of 1024. Raises
    ValueError for an unknown kernel or target, a problem that kernels do not solve (head dims above 512, or of keys in
    decode above 1024; fp64) and a config that is not legal.

    >>> import torch
    >>> from tritonattn.tuning import Problem, compile_kernel
    >>> compile_kernel("forward", Problem(64, 64, torch.bfloat16), target="sm_90").metadata.num_warps
    4
    """
    if kernel not in KERNELS:
        raise ValueError(f"kernel: expected one of {', '.join(KERNELS)}, got {kernel!r}")
    dims = (problem.head_dim, problem.value_dim)
    widest = WIDEST if _LAUNCHERS[kernel] in (_forward, _backward) else WIDEST_KEYS
    if not (1 <= dims[0] <= widest and 1 <= dims[1] <= WIDEST) or problem.dtype not in _DTYPES:
        raise ValueError(
            f"problem: expected head dims from 1 to {widest}, values from 1 to {WIDEST}, and fp16, bf16 or fp32, "
            f"got {dims} and {problem.dtype}"
        )
    target = Target.parse(target) if isinstance(target, str) else target
    config = config or default_config(kernel, problem, target)
    if reasons := legal_reasons(kernel, config, problem, target):
        raise ValueError(f"config: expected a legal one for {kernel} on {target.name}: {'; '.join(reasons)}")
    return compile_launch(launch_of(kernel, problem, config, target), target)


def launch_of(kernel: str, problem: Problem, config: TileConfig, target: Target) -> Launch:
    """The launch of a kernel in a call of the problem, whose tensors are meta tensors."""
    with recording(target, overriding(kernel, config, default_config)) as launches:
        _LAUNCHERS[kernel](problem)
    return next(launch for launch in launches if launch.kernel is KERNELS[kernel])


def compile_launch(launch: Launch, target: Target) -> CompiledKernel:
    """The code that a launch runs on a card of the target; tensors may be meta tensors."""
    warp_size = 64 if target.arch.startswith("gfx9") else 32  # CDNA; RDNA and NVIDIA have 32
    arch = int(target.arch) if target.backend == "cuda" else target.arch
    gpu = GPUTarget(target.backend, arch, warp_size)
    options = compile_options(launch.config, launch.arguments.get("INVARIANT", False))
    return triton.compile(specialised(launch.kernel, launch.arguments, options, gpu), target=gpu, options=options)


def specialised(
    function: JITFunction, arguments: Mapping[str, Any], options: dict[str, Any], target: GPUTarget
) -> ASTSource:
    """The source that `JITFunction.run` compiles for these arguments: types, constants and alignments are its own."""
    backend = make_backend(target)
    bound, specialization, unbound = binder(function, backend)(**arguments, **options)
    if hasattr(function, "_pack_args"):
        _, types, constants, attributes = function._pack_args(backend, options, bound, specialization, unbound)
    else:  # triton 3.4
        kinds, notes = (list(column) for column in zip(*specialization, strict=True))
        types = dict(zip(bound, kinds, strict=True))
        values = list(bound.values())
        paths = find_paths_if(kinds, lambda _, kind: kind == "constexpr")
        constants = {path: get_iterable_path(values, path) for path in paths}
        paths = find_paths_if(notes, lambda _, note: isinstance(note, str))
        attributes = {path: backend.parse_attr(get_iterable_path(notes, path)) for path in paths}
    return ASTSource(function, types, constants, attributes)


# ---- The call of a problem, on tensors without memory


def _tensor(*shape: int, dtype: torch.dtype = torch.float32, aligned: bool = True) -> Tensor:
    """Not aligned: expanded, as other tensors would be copied, with rows of an odd stride."""
    if aligned:
        return torch.empty(shape, dtype=dtype, device="meta")
    batch, *outer, width = shape
    wide = torch.empty((1, *outer, width + 1 + width % 2), dtype=dtype, device="meta")
    return wide[..., :width].expand(batch, *shape[1:])


def _sizes(problem: Problem) -> tuple[int, int, int, int]:
    """Batch entries, query heads, key heads and tokens of a call."""
    batch = 1 if problem.sequences else 2
    return batch, 4 if problem.grouped else 2, 2, 1024 if problem.short else 4096


def _visibility(problem: Problem, q: Tensor, k: Tensor) -> Visibility:
    batch, heads, length, _ = q.shape
    starts = _tensor(batch + 1, dtype=torch.int32)
    return Visibility.of(
        q,
        k,
        causal=problem.right,
        window=(length // 2, None) if problem.left else None,
        key_lengths=_tensor(batch, dtype=torch.int32) if problem.key_lengths else None,
        key_ranges=_tensor(batch, length, 2, dtype=torch.int32) if problem.key_ranges else None,
        mask=_tensor(batch, heads, length, length, dtype=torch.bool) if problem.mask else None,
        sequences=Sequences(starts, starts, length, length) if problem.sequences else None,
    )


def _logits(problem: Problem, rows: tuple[int, int, int], keys: tuple[int, int, int]) -> Logits:
    return Logits(
        1.0,
        _tensor(*rows) if problem.query_scale else None,
        _tensor(*keys) if problem.key_scale else None,
        _tensor(*keys[:2], rows[1] // keys[1], keys[2]) if problem.key_bias else None,
        1.0 if problem.softcap else None,
        _tensor(rows[1]) if problem.sinks else None,
    )


def _attention_call(problem: Problem) -> AttentionCall:
    batch, heads, kv_heads, length = _sizes(problem)
    keys = (batch, kv_heads, length)
    q = _tensor(batch, heads, length, problem.head_dim, dtype=problem.dtype, aligned=problem.aligned)
    k, v = _keys_and_values(problem, keys)
    return AttentionCall(
        q,
        k,
        v,
        _visibility(problem, q, _tensor(*keys, problem.head_dim)),
        _logits(problem, (batch, heads, length), keys),
        Dropout(0.5, _tensor(2, dtype=torch.int64)) if problem.dropout else None,
        block_table=_block_table(problem, keys),
    )


def _keys_and_values(problem: Problem, keys: tuple[int, int, int]) -> tuple[Tensor, Tensor]:
    """k and v [B, Hkv, Sk, D or Dv]; or pages [N, Hkv, page, D or Dv], in memory [N, page, Hkv, D or Dv]."""
    batch, kv_heads, length = keys
    lead = (batch * length // _PAGE, _PAGE, kv_heads) if problem.block_table else keys
    options = {"dtype": problem.dtype, "aligned": problem.aligned}
    k, v = (_tensor(*lead, width, **options) for width in (problem.head_dim, problem.value_dim))
    return (k.transpose(1, 2), v.transpose(1, 2)) if problem.block_table else (k, v)


def _block_table(problem: Problem, keys: tuple[int, int, int]) -> Tensor | None:
    batch, _, length = keys
    return _tensor(batch, length // _PAGE, dtype=torch.int32) if problem.block_table else None


def _results(problem: Problem, call: AttentionCall) -> tuple[Tensor, Tensor | None, Tensor]:
    """out, rounding or None, and lse."""
    shape = (*call.q.shape[:3], problem.value_dim)
    rounding = _tensor(*shape, dtype=torch.int8) if problem.rounding else None
    return _tensor(*shape, dtype=problem.dtype), rounding, _tensor(*shape[:3])


def _forward(problem: Problem) -> None:
    call = _attention_call(problem)
    forward(call, problem.aux, _results(problem, call)[1])


def _backward(problem: Problem) -> None:
    call = _attention_call(problem)
    out, rounding, lse = _results(problem, call)
    d_out = _tensor(*out.shape, dtype=problem.dtype, aligned=problem.aligned)
    needs = Needs(True, True, True, problem.query_scale_grad, problem.key_scale, problem.key_bias, problem.sinks)
    q, k = (x.float() if wide else x for x, wide in ((call.q, problem.wide_q), (call.k, problem.wide_k)))
    call = replace(call, q=q, k=k)
    backward(call, out, lse, d_out, _tensor(*lse.shape) if problem.aux else None, needs, rounding)


def _decode(problem: Problem) -> None:
    batch, _, kv_heads, capacity = _sizes(problem)
    group, rows = (problem.packed_rows, 1) if problem.grouped else (1, problem.packed_rows)
    heads, keys = kv_heads * group, (batch, kv_heads, capacity)
    attend(
        Rows(
            _tensor(batch, heads, rows, problem.head_dim, dtype=problem.dtype, aligned=problem.aligned),
            *_keys_and_values(problem, keys),
            capacity,
            _logits(problem, (batch, heads, rows), keys),
            capacity // 2 if problem.left else None,
            _tensor(batch, dtype=torch.int32),
            _tensor(batch, 1, 2, dtype=torch.int32) if problem.key_ranges else None,
            _block_table(problem, keys),
            _tensor(batch, dtype=torch.int32) if problem.sequences else None,
        ),
        problem.aux,
    )


def _keys(problem: Problem) -> tuple[Tensor, Tensor | None]:
    """k, and which keys are seen where ranges or a mask hide some."""
    batch, _, kv_heads, length = _sizes(problem)
    k = _tensor(batch, kv_heads, length, problem.head_dim, dtype=problem.dtype, aligned=problem.aligned)
    hides = problem.key_ranges or problem.mask
    return k, _tensor(*k.shape[:3], dtype=torch.bool) if hides else None


def _key_lengths(problem: Problem) -> None:
    key_lengths(*_keys(problem))


def _key_lengths_backward(problem: Problem) -> None:
    k, seen = _keys(problem)
    lengths, d_lengths = (_tensor(*k.shape[:3]) for _ in range(2))
    key_lengths_backward(k, seen, lengths, d_lengths, torch.empty_like(k, dtype=torch.float32))  # training adds d_k


def _append_keys(problem: Problem) -> None:
    k, _ = _keys(problem)
    batch, heads, capacity, _ = k.shape
    counts = _tensor(batch, dtype=torch.int64)
    dtypes = (torch.float32, torch.float64, torch.float64, torch.float32)
    sums = (_tensor(batch, heads, capacity + 1 + bool(i), dtype=dtype) for i, dtype in enumerate(dtypes))
    append_keys(k[:, :, :16], None, (counts, *sums))


def _append_to_pages(problem: Problem) -> None:
    batch, heads, capacity = _keys(problem)[0].shape[:3]
    dtypes = (torch.float32, torch.float64, torch.float64, torch.float32)
    buffers = tuple(_tensor(batch * capacity // _PAGE, _PAGE, heads, dtype=dtype) for dtype in dtypes)
    k, ends = _tensor(capacity, heads, problem.head_dim), _tensor(batch + 1, dtype=torch.int32)
    table = _tensor(batch, capacity // _PAGE, dtype=torch.int32)
    append_to_pages(k, ends, _tensor(batch, dtype=torch.int32), table, buffers)


def _prefix_sums(problem: Problem) -> None:
    prefix_sums(_tensor(*_keys(problem)[0].shape[:3]))


def _seen_keys(problem: Problem) -> None:
    seen_keys(_attention_call(replace(problem, mask=False, sequences=False)).visibility)  # others take no kernel


def _rows_of_key_blocks(problem: Problem) -> None:
    visible = _attention_call(replace(problem, key_ranges=True)).visibility  # others take no kernel
    rows_of_key_blocks(visible, range_arguments(visible), 128)


def _argmax_over_ranges(problem: Problem) -> None:
    batch, _, kv_heads, length = _sizes(problem)
    lo, hi = (_tensor(batch, 1, length, dtype=torch.int64) for _ in range(2))
    argmax_over_ranges(_tensor(batch, kv_heads, length), lo, hi)


_LAUNCHERS: dict[str, Callable[[Problem], object]] = {
    "forward": _forward,
    "row_terms": _backward,
    "grad_query": _backward,
    "grad_key_value": _backward,
    "decode": _decode,
    "decode_combine": _decode,
    "key_statistics": _key_lengths,
    "prefix_sums": _prefix_sums,
    "key_statistics_grad": _key_lengths_backward,
    "append_keys": _append_keys,
    "append_to_pages": _append_to_pages,
    "row_bounds": _rows_of_key_blocks,
    "keys_seen": _seen_keys,
    "argmax_of_ranges": _argmax_over_ranges,
}
