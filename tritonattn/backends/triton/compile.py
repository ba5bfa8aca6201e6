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

from ...core.call import AttentionCall, RowGradients
from ...core.private_names import private
from ...core.terms import Gradients, Needs
from ...tuning.calls import Size
from ...tuning.config import WIDEST, WIDEST_KEYS, Problem, Target, TileConfig, legal_reasons
from ...tuning.defaults import default_config
from ..protocol import SecondOrder
from .backward import backward
from .combine import add_splits
from .decode import decode
from .device import Specialisation, binder, compile_options
from .forward import forward
from .key_norms import key_norms, key_norms_backward, prefix_sums
from .key_records import append_keys, append_to_pages
from .launch import KERNELS, Launch, Plan, overriding, recording
from .operands import Operands
from .ranges import argmax_over_ranges, rows_of_key_blocks, seen_keys
from .records import view_of
from .second import second
from .tangent import tangent

_PAGE = 16
_DTYPES = (torch.float16, torch.bfloat16, torch.float32)


def compile_kernel(
    kernel: str, problem: Problem, config: TileConfig | None = None, target: str | Target = "sm_80"
) -> CompiledKernel:
    """Compile a kernel for a target on any machine: Triton's CompiledKernel (`.asm`, `.metadata`).

    kernel    a name in `tritonattn.backends.triton.KERNELS`: forward, grad_query, grad_key_value, key_statistics, ...
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
    widest = WIDEST if _LAUNCHERS[kernel] in (_forward, _backward, _tangent, _second) else WIDEST_KEYS
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
    function = Plan.of(kernel, config, problem, target).kernel
    return next(launch for launch in launches if launch.kernel is function)


def compile_launch(launch: Launch, target: Target) -> CompiledKernel:
    """The code that a launch runs on a card of the target; tensors may be meta tensors."""
    arch = int(target.arch) if target.backend == "cuda" else target.arch
    gpu = GPUTarget(target.backend, arch, target.architecture.warp_size)
    options = compile_options(launch.config, launch.arguments.get("INVARIANT", False))
    return triton.compile(specialised(launch.kernel, launch.arguments, options, gpu), target=gpu, options=options)


def specialised(
    function: JITFunction, arguments: Mapping[str, Any], options: dict[str, Any], target: GPUTarget
) -> ASTSource:
    """The source that `JITFunction.run` compiles for these arguments: with the same types, constants and alignments."""
    backend = make_backend(target)
    bound, specialization, unbound = binder(function, backend)(**arguments, **options)
    if hasattr(function, "_pack_args"):
        _, types, constants, attributes = function._pack_args(backend, options, bound, specialization, unbound)
    else:  # triton 3.4
        types_of, notes = (list(column) for column in zip(*specialization, strict=True))
        types = dict(zip(bound, types_of, strict=True))
        values = list(bound.values())
        paths = find_paths_if(types_of, lambda _, one: one == "constexpr")
        constants = {path: get_iterable_path(values, path) for path in paths}
        paths = find_paths_if(notes, lambda _, note: isinstance(note, str))
        attributes = {path: backend.parse_attr(get_iterable_path(notes, path)) for path in paths}
    source = ASTSource
    if getattr(function, "is_gluon", bool)():
        source = private("triton.experimental.gluon._runtime.GluonASTSource")
    return source(function, types, constants, attributes)


# ---- The call of a problem, on tensors without memory


def _tensor(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def _operands(problem: Problem) -> Operands:
    """Operands of two batch entries, or one packed sequence, with two key heads."""
    length, heads = 1024 if problem.short else 4096, 4 if problem.grouped else 2
    size = Size(
        batch=1 if problem.sequences else 2,
        heads=heads,
        q_len=length,
        k_len=length,
        group=heads // 2,
        q_total=length,
        k_total=length,
        page=_PAGE if problem.block_table else 0,
        left=length // 2,
    )
    return Operands(problem, size, torch.device("meta"))


def _results(problem: Problem, call: AttentionCall) -> tuple[Tensor, Tensor | None, Tensor]:
    """out, rounding or None, and lse."""
    shape = (*call.q.shape[:3], problem.value_dim)
    rounding = _tensor(*shape, dtype=torch.int8) if problem.rounding else None
    return _tensor(*shape, dtype=problem.dtype), rounding, _tensor(*shape[:3])


def _forward(problem: Problem) -> None:
    call = _operands(problem).attention()
    forward(call, problem.aux, _results(problem, call)[1])


def _backward(problem: Problem) -> None:
    operands = _operands(problem)
    size = replace(operands.size, heads=16 * operands.size.heads)  # so many that their rows are not split
    operands = Operands(problem, size, operands.device)
    call = operands.attention()
    out, rounding, lse = _results(problem, call)
    terms = {name: getattr(problem, name) for name in Needs._fields[4:]}
    needs = Needs(True, True, True, problem.query_scale_grad, **terms)
    d_lse = _tensor(*lse.shape) if problem.aux else None
    backward(call, out, lse, operands.operand(*out.shape), RowGradients(d_lse), needs, rounding)


def _tangent(problem: Problem) -> None:
    """Of tangents of all tensors."""
    call = _operands(problem).attention()
    out, rounding, lse = _results(problem, call)
    tangent(call, (out, lse, rounding), Gradients(*call.tensors()))


def _second(problem: Problem) -> None:
    """Of tangents of all tensors, towards these and their tangents."""
    operands = _operands(problem)
    call = operands.attention()
    (out, rounding, lse), tangents = _results(problem, call), Gradients(*call.tensors())
    needs = Needs(*(x is not None for x in tangents))
    d_out, d_lse = operands.operand(*out.shape), _tensor(*lse.shape) if problem.aux else None
    second(call, (out, lse, rounding), SecondOrder(tangents, d_out, d_lse, needs, needs))


def _decode(problem: Problem) -> None:
    operands = _operands(problem)
    group, rows = (problem.packed_rows, 1) if problem.grouped else (1, problem.packed_rows)
    size = replace(operands.size, heads=2 * group, q_len=rows, group=group)
    decode(Operands(problem, size, operands.device).decode(), problem.aux)


def _sum_of_splits(problem: Problem) -> None:
    result = _tensor(2, 2, 1024, problem.head_dim, dtype=problem.dtype)
    add_splits(Specialisation(problem, wide=False), _tensor(4, *result.shape), result)


def _keys(problem: Problem) -> tuple[Tensor, Tensor | None]:
    """k, and which keys are seen where ranges or a mask hide some."""
    operands = _operands(problem)
    size = operands.size
    k = operands.operand(size.batch, size.kv_heads, size.k_len, problem.head_dim)
    hides = problem.key_ranges or problem.mask
    return k, _tensor(*k.shape[:3], dtype=torch.bool) if hides else None


def _key_norms(problem: Problem) -> None:
    key_norms(*_keys(problem))


def _key_norms_backward(problem: Problem) -> None:
    k, seen = _keys(problem)
    norms, d_norms = (_tensor(*k.shape[:3]) for _ in range(2))
    key_norms_backward(k, seen, norms, d_norms, torch.empty_like(k, dtype=torch.float32))  # training adds d_k


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
    addends, begins_again = _tensor(*_keys(problem)[0].shape[:3]), problem.key_ranges or problem.sequences
    prefix_sums(addends, _tensor(*addends.shape, dtype=torch.bool) if begins_again else None)


def _seen_keys(problem: Problem) -> None:
    seen_keys(_operands(replace(problem, mask=False, sequences=False)).attention().visibility)  # others take no kernel


def _rows_of_key_blocks(problem: Problem) -> None:
    visible = _operands(replace(problem, key_ranges=True)).attention().visibility  # others take no kernel
    rows_of_key_blocks(visible, view_of(visible), 128)


def _argmax_over_ranges(problem: Problem) -> None:
    size = _operands(problem).size
    lo, hi = (_tensor(size.batch, 1, size.k_len, dtype=torch.int64) for _ in range(2))
    argmax_over_ranges(_tensor(size.batch, size.kv_heads, size.k_len), lo, hi)


_LAUNCHERS: dict[str, Callable[[Problem], object]] = {
    "forward": _forward,
    "row_terms": _backward,
    "grad_query": _backward,
    "grad_key_value": _backward,
    "tangent": _tangent,
    "grad_query_second": _second,
    "grad_key_value_second": _second,
    "decode": _decode,
    "combine_splits": _decode,
    "sum_of_splits": _sum_of_splits,
    "key_statistics": _key_norms,
    "prefix_sums": _prefix_sums,
    "key_statistics_grad": _key_norms_backward,
    "append_keys": _append_keys,
    "append_to_pages": _append_to_pages,
    "row_bounds": _rows_of_key_blocks,
    "keys_seen": _seen_keys,
    "argmax_of_ranges": _argmax_over_ranges,
}
