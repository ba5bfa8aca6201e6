"""Run a checked call on a backend, and return its results."""

from __future__ import annotations

import functools
import importlib.util
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from .. import ops
from ..backends import flash
from ..backends.cpu import sdpa
from ..core.autograd import autocast_is_on, is_transformed, needs_graph, refuse_tangents
from ..core.cached_norms import StatisticsOfCache
from ..core.call import AttentionCall, Request
from ..core.dropout import Dropout
from ..core.hints import warn_once
from ..core.observation import ObservedCall, ObservedRows, notify_observers, observers
from ..core.pair_biases import sum_of_tables
from ..core.row_terms import sinks_beside
from ..core.sequences import PageTable
from ..core.statistics import DoubleStatistics, Statistics
from ..core.terms import Gradients, Terms, per_group
from ..core.visibility import Visibility
from ..scaling import SCALINGS, Scales, Scaling
from .checks import check_factor, check_key_bias, check_number, relative_bias_of, scale_dtype
from .formulas import by_formulas
from .results import AttentionAux, aux_of

_HAS_TRITON = importlib.util.find_spec("triton") is not None
_LARGEST_KERNEL_DIM = 512
_LARGEST_KEY_OF_DECODE = 1024
_DIM_OF_EVERY_GPU = 256


def run(request: Request) -> Tensor | tuple[Tensor, AttentionAux]:
    """Attention as a checked request asks for it."""
    q, k, aux = request.q, request.k, request.aux
    if autocast_is_on(q):
        with torch.autocast(q.device.type, enabled=False):
            return run(request)
    is_compiled, has_transform = torch.compiler.is_compiling(), torch._C._are_functorch_transforms_active()
    if is_compiled and request.backend == "flash":
        uncompiled: Any = torch._dynamo.disable(run)  # torch.compile cannot trace its libraries
        return uncompiled(request)
    if is_compiled and has_transform:
        # Dynamo's rules for autograd functions in torch.func.grad gave wrong gradients. Raising leaves the call
        # uncompiled; fullgraph=True hands the error on.
        raise RuntimeError("tritonattn: a torch.func transform of attention is not compiled")
    backend = choose_backend(request)
    if request.backend == "auto" and backend == "triton" and not is_compiled and _flash_is_faster(request):
        backend = "flash"
    dropout = Dropout.draw(request.dropout_p, q.device) if request.dropout_p > 0 else None
    given = request
    if q.dtype.itemsize == 2 and not (request.cached or _norms_by_kernels(backend, k)):
        if has_transform or needs_graph(q, k):  # gradients of logits and of norms are added, then rounded
            request = request.changed(q=q.float(), k=k.float())
    result = by_formulas(request, dropout) if backend == "reference" else None
    if result is None:
        in_forward_mode = forward_ad._current_level >= 0
        if in_forward_mode:
            refuse_tangents(backend, Gradients._fields, request.tensors())
        call = resolve(request, backend, dropout)
        if in_forward_mode:
            refuse_tangents(backend, Gradients._fields, call.tensors())  # of the scaling
        # torch maps its attention in a loop under vmap; our operators fold the mapped axis into the batch.
        folds = backend == "sdpa" and not has_transform and sdpa.supports(call)
        attend = flash.attention if backend == "flash" else ops.attention
        result = sdpa.attention(call) if folds else attend(call)
    # A compiler reads no state here.
    if not (is_compiled or has_transform or given.cached) and observers.get():
        _notify(given, result.out)
    return (result.out, aux_of(result)) if aux else result.out


def _flash_is_faster(request: Request) -> bool:
    """True where a table measured on this card names a library for "auto", and it takes the call."""
    library = _faster_library(request.q.device)
    return library != "" and not request.aux and flash.takes(request, library)


@functools.cache
def _faster_library(device: torch.device) -> str:
    from ..tuning.config import Target
    from ..tuning.lookup import faster_library

    return faster_library(Target.of(device)) if device.type == "cuda" else ""


def _norms_by_kernels(backend: str, k: Tensor) -> bool:
    """True where a call takes the statistics of its keys from kernels; "flash" does on a GPU that runs them."""
    return backend == "triton" or (backend == "flash" and kernels_take(k))


def resolve(request: Request, backend: str, dropout: Dropout | None = None) -> AttentionCall:
    """The call that a checked request is on a backend: with the terms of its logits computed."""
    is_cached = request.cached != ""
    source = "triton" if backend == "triton" or _norms_by_kernels(backend, request.k) else "sdpa"
    statistics = ops.STATISTICS[source](request.keys if is_cached else request.k, request.visibility)
    if not is_cached:
        call = with_terms(request, backend, logits(request, statistics), dropout)
        if call.visibility.invariant and backend == "triton":
            _refuse_scaled_halves(call)
        return statistics.widened(call) if statistics.wide else call
    if request.statistics is not None:
        table, sequences = request.block_table, request.visibility.sequences
        pages = None if table is None else PageTable(table, request.k.shape[2], sequences)
        statistics = StatisticsOfCache(statistics, request.statistics, pages, _width(request))
    terms = logits(request, statistics, _keys_for_scaling(request))
    of_scaling = {"scaling": terms.query_scale, "key_scale": terms.key_scale, "key_bias": terms.key_bias}
    refuse_gradients(request.cached, **of_scaling, relative_bias=terms.relative_bias)
    return with_terms(request, backend, terms)


def with_terms(request: Request, backend: str, terms: Terms, dropout: Dropout | None = None) -> AttentionCall:
    """The call that a checked request is on a backend with all terms of its logits."""
    settings = dropout, backend, request.aux, request.cached != "", request.block_table
    return AttentionCall(request.q, request.k, request.v, request.visibility, terms, *settings)


def _width(request: Request) -> int | None:
    """The most keys that a row attends to, as of `StatisticsOfCache`."""
    visible, sequences = request.visibility, request.visibility.sequences
    if visible.left is None:
        return None
    if sequences is None:
        return visible.left + 1
    right = sequences.longest_k if visible.right is None else visible.right
    return min(visible.left + 1 + right, sequences.longest_k)


def _keys_for_scaling(request: Request) -> Tensor:
    """The k of a scaling: a shape alone, not a copy of pages, where it reads no keys."""
    if request.block_table is None or request.scaling.reads_keys:
        return request.keys()
    visible, q = request.visibility, request.q
    return q.new_full((), torch.nan).expand(visible.batch, visible.kv_heads, visible.k_len, q.shape[3])


def logits(request: Request, statistics: Statistics, k: Tensor | None = None, positions: Tensor | None = None) -> Terms:
    """Compute the terms of the logits of a checked request: the scaling's scales times the gain, and all biases.

    statistics   of the keys that its rows attend to
    k            stands for request.k before the scaling, or None
    positions    of the rows among the keys, int64 [1, Sq], or None, where the request's visibility knows them
    """
    q, given, visible = request.q, request.logits, request.visibility
    bias, sinks = given.key_bias, given.sinks
    scales = scales_of(request.scaling, request.gain, q, request.k if k is None else k, visible, statistics)
    if bias is not None:
        bias = per_group(bias.to(scale_dtype(q)), visible)
    if scales.key_bias is not None:
        sinks = sinks_beside(scales.key_bias, given, visible, positions)
        added = per_group(scales.key_bias.to(scale_dtype(q)), visible)
        bias = added if bias is None else added + bias
    _, _, _, _, _, *others = given
    terms = Terms(scales.constant, scales.query, scales.key, bias, sinks, *others)  # pyright: ignore[reportArgumentType]
    if not (given.bias is None and given.relative_bias is None and scales.relative_bias is None):
        terms = terms.changed(**_pairs(given, scales, visible))
    return terms.settled()


def _pairs(given: Terms, scales: Scales, visible: Visibility) -> dict[str, Any]:
    """bias, relative_bias and relative_right of a call and its scaling."""
    table, right = given.relative_bias, given.relative_right
    if scales.relative_bias is not None:
        added = scales.relative_bias, scales.relative_right
        table, right = added if table is None else sum_of_tables(table, right, *added)
    if table is not None:
        if visible.invariant and visible.key_ranges is not None:
            raise NotImplementedError("relative_bias: not supported with key_ranges under batch_invariant")
        table = _per_entry(table, visible, table.shape[3])
    bias = None if given.bias is None else _per_entry(given.bias, visible, visible.k_len)
    return {"bias": bias, "relative_bias": table, "relative_right": right}


def _per_entry(bias: Tensor, visibility: Visibility, width: int) -> Tensor:
    """A bias of pairs, one for each batch entry where entries are taken apart: mapped by torch.func, or rolled.

    In fp32 at least, so that gradients are summed over entries before they are rounded.
    """
    rolls = visibility.invariant and visibility.key_ranges is not None
    if not (rolls or is_transformed()):
        return bias
    wide = bias.to(torch.promote_types(bias.dtype, torch.float32))
    return wide.expand(visibility.batch, -1, -1, width)


def scales_of(
    scaling: Scaling,
    gain: float | Tensor | None,
    q: Tensor,
    k: Tensor,
    visibility: Visibility,
    statistics: Statistics,
    exact: bool = False,
) -> Scales:
    """The scaling's scales times the gain, as a float, [B, Hq, Sq] and [B, Hkv, Sk], and its bias as it is.

    exact   scales of a mode of `SCALINGS` in fp64, neither rounded nor expanded, for a mode that combines others
    """
    if exact or isinstance(gain, Tensor):
        is_mode = type(scaling) is SCALINGS.get(getattr(scaling, "name", ""))
        statistics = DoubleStatistics(statistics) if is_mode else statistics
    scales = scaling.scales(q, k, visibility, statistics)
    name = f"{getattr(scaling, 'name', type(scaling).__name__)}.scales()"
    if not isinstance(scales, Scales):
        raise TypeError(f"{name}: expected Scales, got {type(scales).__name__}")
    constant, query, key = scales.constant, scales.query, scales.key
    check_number(f"{name}.constant", constant)
    rows, kv_heads = (visibility.batch, visibility.q_heads, visibility.q_len), visibility.kv_heads
    if query is not None:
        # One key head broadcasts, but then torch adds up the heads' gradients in an order that follows the length.
        repeats = kv_heads != visibility.q_heads and (kv_heads > 1 or visibility.invariant)
        if repeats and isinstance(query, Tensor) and query.dim() > 1 and query.shape[-2] == kv_heads:
            check_factor(f"{name}.query", query, q, (rows[0], kv_heads, rows[2]), "[B, Hkv, Sq]")
            query = visibility.repeated(query)
        else:
            check_factor(f"{name}.query", query, q, rows, "[B, Hq, Sq]")
        if not (scales.is_finite or visibility.every_row_attends):
            query = _where_attending(visibility, query)
    if isinstance(gain, Tensor):
        gain = gain if visibility.every_row_attends else _where_attending(visibility, gain)
        query = gain if query is None else query * gain
    elif gain is not None:
        constant = constant * gain
        check_number(f"{name}.constant * gain", constant)
    if key is not None:
        check_factor(f"{name}.key", key, q, visibility.keys, "[B, Hkv, Sk]")
    if scales.key_bias is not None:
        check_key_bias(f"{name}.key_bias", scales.key_bias, q, visibility.keys, "[B, Hq or Hkv, Sk]")
    table = scales.relative_bias
    if table is not None:
        table = relative_bias_of(f"{name}.", table, scales.relative_right, q, rows, "[B, Hq, Sq]")
    if query is None and key is None and gain is None and table is None:
        return scales
    if not exact:
        query = query if query is None else _expanded(query, q, rows)
        key = key if key is None else _expanded(key, q, visibility.keys)
    return Scales(constant, query, key, False, scales.key_bias, table, scales.relative_right)


def _expanded(scale: Tensor, q: Tensor, shape: tuple[int, ...]) -> Tensor:
    """A scale in the dtype in which it acts with q, and of a shape to which it broadcasts."""
    if scale.dtype != torch.float32 or q.dtype == torch.float64:
        scale = scale.to(torch.promote_types(q.dtype, torch.float32))
    is_whole = scale.dim() == len(shape) and scale.shape == shape  # tuples compare sizes first, and tracing binds them
    return scale if is_whole else scale.expand(shape)


def _where_attending(visibility: Visibility, query: Tensor) -> Tensor:
    """A query scale with 0 for rows without keys, where a mode may have divided by 0 or met NaN in q."""
    return torch.where(visibility.attending_rows(), query, 0)


def refuse_gradients(call: str, /, **tensors: Any) -> None:
    """Raise where one of these tensors would have to carry a derivative of a `call`."""
    for name, x in tensors.items():
        if isinstance(x, Tensor) and needs_graph(x):
            raise NotImplementedError(
                f"{name}: {call} has no gradient, got a tensor that requires one; call it under"
                " torch.no_grad() or torch.inference_mode(), or `attention`, which has"
            )


def _notify(request: Request, out: Tensor) -> None:
    """Hand a checked request to its observers."""
    notify_observers(ObservedCall(request.q, request.k, out, request, lambda: observed_rows(request)))


@torch.no_grad()
def observed_rows(request: Request) -> ObservedRows:
    """The softmax of the rows of a checked request, and its largest logits without biases."""
    backend = {"flash": "auto", "reference": "sdpa"}.get(request.backend, request.backend)  # a library has no entropy
    narrow = request.k.detach()[..., :1]  # stands for v; its values reach nothing that is read
    request = request.changed(v=narrow, aux=True, dropout_p=0.0, backend=backend)
    call = resolve(request, choose_backend(request))
    found, terms = aux_of(ops.attention(call)), call.logits
    largest = capped = found.max_logit
    if terms.softcap is not None and not terms.bias_after_softcap:
        capped = terms.softcap * torch.tanh(largest / terms.softcap)
    biases = {"key_bias": terms.key_bias, "bias": terms.bias, "relative_bias": terms.relative_bias}
    hiding = {name: torch.where(x == -torch.inf, x, 0) for name, x in biases.items() if x is not None}
    if hiding:
        plain = call.changed(logits=terms.changed(**hiding, bias_after_softcap=False))
        largest = aux_of(ops.attention(plain)).max_logit
    return ObservedRows(largest, torch.exp(capped - found.lse), found.entropy)


def choose_backend(request: Request) -> str:
    """Choose the backend of a request: the one asked for, which must support it, or for "auto" one that does."""
    q, v, backend = request.q, request.v, request.backend
    # The decode kernel takes wider keys.
    decodes = request.cached != "" and request.visibility.sequences is None and not request.visibility.invariant
    if backend == "triton" and (obstacle := _kernel_obstacle(q, v, decodes)):
        raise NotImplementedError(
            f"{obstacle}: backend 'triton' does not support it; backends 'sdpa' and 'reference' do"
        )
    sequences = request.visibility.sequences
    is_empty = backend == "flash" and sequences is not None and sequences.q_starts.shape[0] == 1
    if is_empty or q.numel() == 0 or request.k.numel() == 0:
        backend = "sdpa"  # nothing to compute
    elif backend == "auto":
        backend = "sdpa"
        if q.device.type == "cuda":
            obstacle = _kernel_obstacle(q, v, decodes) or (not _HAS_TRITON and "triton is not installed")
            backend = "sdpa" if obstacle else "triton"
            if obstacle and not torch.compiler.is_compiling():
                warn_once(f"tritonattn: backend 'sdpa' instead of 'triton': {obstacle}")
    elif backend == "triton":
        _check_kernels_run_on(q.device)
    elif backend == "flash":
        flash.refuse_unsupported(request)
    if request.visibility.invariant:
        _refuse_dependence(q, backend, request.dropout_p)
    return backend


def _refuse_dependence(q: Tensor, backend: str, dropout_p: float) -> None:
    """Raise where a row's bits would depend on the rest of the batch although `batch_invariant` is on."""
    obstacle = None
    if dropout_p > 0:
        obstacle = "dropout_p above 0, whose bits follow the position in the batch"
    elif backend == "reference":
        obstacle = "backend 'reference', whose products follow the lengths"
    elif backend == "sdpa" and q.device.type == "cuda":
        obstacle = f"backend 'sdpa' on {q.device}, whose products follow the lengths"
    if obstacle is not None:
        raise NotImplementedError(f"batch_invariant: not supported with {obstacle}")


def _refuse_scaled_halves(call: AttentionCall) -> None:
    """Raise for gradients of fp16 with scales: kernels divide by the largest scale of a head before they round."""
    terms = call.logits
    is_scaled = terms.query_scale is not None or terms.key_scale is not None
    if call.v.dtype == torch.float16 and is_scaled and needs_graph(*call.tensors()[:5]):  # not of key_bias and sinks
        raise NotImplementedError(
            "batch_invariant: not supported with gradients of float16 through a scaling with vectors: kernels divide"
            " these by a head's largest entry before they round; use bfloat16 or float32"
        )


def kernels_take(x: Tensor) -> bool:
    """True where "auto" runs kernels on x [B, H, S, D]."""
    return x.device.type == "cuda" and _HAS_TRITON and _kernel_obstacle(x, x) is None


def _kernel_obstacle(q: Tensor, v: Tensor, decodes: bool = False) -> str | None:
    """Name the property of a call that kernels cannot honour, or None."""
    if q.dtype == torch.float64:
        return "q of dtype torch.float64"
    if q.device.type == "cuda" and _HAS_TRITON and (obstacle := _obstacle_of_card(q.device)):
        return obstacle
    head_dim, value_dim = q.shape[3], v.shape[3]
    if head_dim <= _DIM_OF_EVERY_GPU and value_dim <= _DIM_OF_EVERY_GPU:
        return None
    largest_key = _LARGEST_KEY_OF_DECODE if decodes else _LARGEST_KERNEL_DIM
    for dim, limit in ((head_dim, largest_key), (value_dim, _LARGEST_KERNEL_DIM)):
        if dim > limit:
            return f"head_dim {dim}, above {limit}"
    if q.device.type == "cuda" and _HAS_TRITON:
        return _obstacle_of_memory(head_dim, value_dim, q.dtype, q.device, decodes)
    return None


def _obstacle_of_card(device: torch.device) -> str | None:
    """Say that Triton has no code for a device's tensor cores, or None."""
    return _kept_obstacle_of_card(device)


@functools.cache
def _kept_obstacle_of_card(device: torch.device) -> str | None:
    from ..tuning.config import Target

    if not torch.cuda.is_available():  # tensors of a trace
        return None
    target = Target.of(device)
    return f"{target.name}, for whose tensor cores Triton has no code," if target.is_too_old else None


def _obstacle_of_memory(
    head_dim: int, value_dim: int, dtype: torch.dtype, device: torch.device, decodes: bool
) -> str | None:
    """Name what a device lacks for the kernels at wide heads, or None."""
    from ..tuning.config import TILED_KERNELS, Target
    from ..tuning.defaults import obstacle

    return obstacle(head_dim, value_dim, dtype, Target.of(device), ("decode",) if decodes else TILED_KERNELS)


# The mark of torch.compiler.assume_constant_result, which imports all of torch._dynamo, in a second.
_obstacle_of_card._dynamo_marked_constant = True  # pyright: ignore[reportFunctionMemberAccess]
_obstacle_of_memory._dynamo_marked_constant = True  # pyright: ignore[reportFunctionMemberAccess]


def _check_kernels_run_on(device: torch.device) -> None:
    if not _HAS_TRITON:
        raise ImportError(
            "backend: 'triton' needs the package triton, which is not installed: pip install \"triton>=3.4\""
            " (Linux) or triton-windows; backends 'sdpa' and 'reference' do without"
        )
    if device.type == "cuda":
        return
    from ..backends.triton.launch import runs_on  # `kernels` is cached by a wrapper that torch.compile warns of

    if not runs_on(device):
        raise ValueError(
            f"backend: expected tensors on a CUDA or HIP device for 'triton', got {device}; kernels run on CPU"
            " tensors only in triton's interpreter, with TRITON_INTERPRET=1 in the environment"
        )
