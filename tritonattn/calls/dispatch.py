"""Run a checked call on a backend, and return its results."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor

from .. import ops
from ..backends import BACKENDS, choose, kernels_take
from ..backends.protocol import Backend
from ..core.autograd import autocast_is_on, in_forward_mode, is_transformed, kept, needs_graph, transforms_are_active
from ..core.cached_norms import StatisticsOfCache
from ..core.call import AttentionCall, ForwardResult, Request
from ..core.dropout import Dropout
from ..core.eight_bit import EIGHT_BIT, of_rows, times
from ..core.hints import type_of
from ..core.observation import ObservedCall, ObservedRows, notify_observers, observers
from ..core.pair_biases import Table, of_one_extent
from ..core.row_terms import sinks_beside
from ..core.sequences import PageTable
from ..core.statistics import DoubleStatistics, Statistics
from ..core.terms import ADDENDS, AXES, DEFAULTS, PAIRS, TENSORS, Terms, per_group
from ..core.visibility import Visibility
from ..scaling import Scales, Scaling
from .checks import check_factor, check_key_bias, check_number, scale_dtype, table_of
from .formulas import by_formulas, softcap_behind
from .results import AttentionAux, aux_of


def run(request: Request) -> Tensor | tuple[Tensor, AttentionAux]:
    """Attention as a checked request asks for it."""
    q, k, aux = request.q, request.k, request.aux
    if autocast_is_on(q):
        with torch.autocast(q.device.type, enabled=False):
            return run(request)
    is_compiled, has_transform = torch.compiler.is_compiling(), transforms_are_active()
    if is_compiled and request.backend != "auto" and not BACKENDS[request.backend].is_traced:
        uncompiled: Any = torch.compiler.disable(run)
        return uncompiled(request)
    if is_compiled and (has_transform or in_forward_mode()):
        # Dynamo's rules for autograd functions in torch.func.grad gave wrong gradients, and it takes none with a jvp.
        # Raising leaves the call uncompiled; fullgraph=True hands the error on.
        raise RuntimeError("tritonattn: a torch.func transform or a tangent of attention is not compiled")
    backend = choose(request)
    dropout = Dropout.draw(request.dropout_p, q.device) if request.dropout_p > 0 else None
    given = request
    if q.dtype.itemsize == 2 and not (request.cached or backend.statistics):
        # Gradients of logits and of norms are added, then rounded.
        if (has_transform or needs_graph(q, k)) and not (backend.statistics is None and kernels_take(k)):
            request = request.changed(q=q.float(), k=k.float())
    if backend.by_formulas:
        result = by_formulas(request, dropout)
    else:
        call = resolve(request, backend, dropout)
        result = None if backend.attention is None else backend.attention(call, ops.attention)
        result = ops.attention(call) if result is None else result
        if request.v.dtype == EIGHT_BIT:
            result = ForwardResult(finished(result.out, request), *result[1:])
    # A compiler reads no state here.
    if not (is_compiled or has_transform or given.cached) and observers.get():
        _notify(given, result.out)
    return (result.out, aux_of(result, backend.by_formulas)) if aux else result.out


def statistics_of(request: Request, backend: Backend) -> Statistics:
    """The statistics of the keys of a request, as its backend has them computed."""
    has_kernels = kernels_take(request.k) if backend.statistics is None else backend.statistics
    kind = ops.KernelStatistics if has_kernels else Statistics
    return kind(request.keys if request.cached else request.k, request.visibility)


def resolve(request: Request, backend: Backend, dropout: Dropout | None = None) -> AttentionCall:
    """The call that a checked request is on a backend: with the terms of its logits computed."""
    statistics = statistics_of(request, backend)
    if not request.cached:
        call = with_terms(request, backend, logits(request, statistics), dropout)
        if call.visibility.invariant:
            backend.refuse_terms(call)
        return statistics.widened(call) if statistics.in_fp32 else call
    if request.statistics is not None:
        table, sequences = request.block_table, request.visibility.sequences
        pages = None if table is None else PageTable(table, request.k.shape[2], sequences)
        statistics = StatisticsOfCache(statistics, request.statistics, pages, _width(request))
    if request.k_descale is not None:
        request = request.changed(gain=_product(request.gain, of_rows(request.k_descale, request.visibility)))
    terms = logits(request, statistics, _keys_for_scaling(request))
    if needs_graph(*(computed := terms.tensors())):
        refuse_gradients(request.cached, **dict(zip(_OF_CACHE, computed, strict=True)))
    return with_terms(request, backend, terms)


def _product(gain: Any, other: Any) -> Any:
    return other if gain is None else gain * other


def finished(out: Tensor, request: Request) -> Tensor:
    """The output of a call over 8-bit values as that over what they stand for, rounded once to q's dtype."""
    visible, descale = request.visibility, request.v_descale
    descale = descale if descale is None else of_rows(descale, visible)
    if isinstance(descale, Tensor) and not visible.every_row_attends:
        descale = _where_attending(visible, descale)
    return times(out, descale).to(request.q.dtype)


def with_terms(request: Request, backend: Backend, terms: Terms, dropout: Dropout | None = None) -> AttentionCall:
    """The call that a checked request is on a backend with all terms of its logits."""
    settings = dropout, backend.name, request.aux, request.cached != "", request.block_table
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
    """The k of a scaling: a shape alone, not a copy of pages or of 8-bit keys, where it reads no keys."""
    is_held = request.block_table is None and request.k.dtype != EIGHT_BIT
    if is_held or request.scaling.reads_keys:
        return request.keys()
    visible, q = request.visibility, request.q
    return kept(_unread, q.device, q.dtype).expand(visible.batch, visible.kv_heads, visible.k_len, q.shape[3])


def _unread(device: torch.device, dtype: torch.dtype) -> Tensor:
    return torch.full((), torch.nan, dtype=dtype, device=device)


def logits(request: Request, statistics: Statistics, k: Tensor | None = None, positions: Tensor | None = None) -> Terms:
    """Compute the terms of the logits of a checked request: the scaling's scales times the gain, and all biases.

    statistics   of the keys that its rows attend to
    k            stands for request.k before the scaling, or None
    positions    of the rows among the keys, int64 [1, Sq], or None, where the request's visibility knows them
    """
    q, given, visible = request.q, request.terms, request.visibility
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
    has_others = has_pairs = scales.relative_bias is not None or scales.relative is not None
    for number, default, is_pairs in _BEHIND_SINKS:
        if given[number] is not default:
            has_others, has_pairs = True, has_pairs or is_pairs
    if has_pairs:
        terms = terms.changed(**_pairs(given, scales, visible))
    if request.scaling.after_softcap and terms.softcap is not None:
        softcap = softcap_behind(request, scales.constant, scales.query)
        terms, has_others = terms.changed(softcap=softcap, query_scale_after_softcap=True), True
    return terms.settled() if has_others else terms


_OF_CACHE = "scaling", *Terms._fields[2 : TENSORS.stop]  # what errors call the terms' tensors
_BEHIND_SINKS = [
    (i, DEFAULTS[i], name in PAIRS) for i, name in enumerate(Terms._fields) if i > Terms._fields.index("sinks")
]


def _pairs(given: Terms, scales: Scales, visible: Visibility) -> dict[str, Any]:
    """The terms of pairs of a call and its scaling, and relative_right."""
    tables = [
        ("relative_bias", given.relative_bias, given.relative_right, torch.add),
        ("relative_bias", scales.relative_bias, scales.relative_right, torch.add),
        ("relative_scale", given.relative_scale, given.relative_right, torch.mul),
        ("relative_scale", scales.relative, scales.relative_right, torch.mul),
    ]
    there = [
        (name, Table(x, right, float(join is torch.mul)), join) for name, x, right, join in tables if x is not None
    ]
    whole = [one for _, one, _ in there]
    whole = of_one_extent(*whole) if len(whole) > 1 else whole
    found: dict[str, Any] = {"relative_right": whole[0].right if whole else 0}
    for (name, _, join), one in zip(there, whole, strict=True):
        found[name] = join(found[name], one.numbers) if name in found else one.numbers
    for name in PAIRS:
        x, last = found.get(name, getattr(given, name)), AXES[name][-1]
        if x is not None:
            if last == "extent" and visible.invariant and visible.key_ranges is not None:
                raise NotImplementedError(f"{name}: not supported with key_ranges under batch_invariant")
            found[name] = _per_entry(x, visible, visible.k_len if last == "Sk" else x.shape[3])
    return found


def _per_entry(bias: Tensor, visibility: Visibility, width: int) -> Tensor:
    """A term of pairs, one for each batch entry where entries are taken apart: mapped by torch.func, or rolled.

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

    exact   scales in fp64 where the mode `takes_fp64`, neither rounded nor expanded, for a mode that combines others
    """
    if scaling.takes_fp64 and (exact or isinstance(gain, Tensor)):
        statistics = DoubleStatistics(statistics)
    scales = scaling.scales(q, k, visibility, statistics)
    name = getattr(scaling, "name", type(scaling).__name__) + ".scales()"
    if not isinstance(scales, Scales):
        raise TypeError(f"{name}: expected Scales, got {type(scales).__name__}")
    constant, query, key = scales.constant, scales.query, scales.key
    check_number(name + ".constant", constant)
    has_tables = scales.relative_bias is not None or scales.relative is not None
    if not has_tables and (type(scales.relative_right) is not int or scales.relative_right):
        got = type_of(scales.relative_right)
        raise ValueError(f"{name}.relative_right: expected 0 without relative and relative_bias, got {got}")
    if query is None and key is None and gain is None and scales.key_bias is None and not has_tables:
        return scales
    tables, right = {"relative_bias": scales.relative_bias, "relative": scales.relative}, scales.relative_right
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
    for table, x in tables.items():
        if x is not None:
            tables[table] = table_of(f"{name}.{table}", x, f"{name}.relative_right", right, q, rows, "[B, Hq, Sq]")
    if not exact:
        query = query if query is None else _expanded(query, q, rows)
        key = key if key is None else _expanded(key, q, visibility.keys)
    return Scales(constant, query, key, False, scales.key_bias, relative_right=right, **tables)


def _expanded(scale: Tensor, q: Tensor, shape: tuple[int, ...]) -> Tensor:
    """A scale in the dtype in which it acts with q, and of a shape to which it broadcasts."""
    if scale.dtype != torch.float32 or q.dtype == torch.float64:
        scale = scale.to(torch.promote_types(q.dtype, torch.float32))
    is_whole = scale.dim() == len(shape) and scale.shape == shape  # tuples compare sizes first, and tracing binds them
    return scale if is_whole else scale.expand(shape)


def _where_attending(visibility: Visibility, factor: Tensor) -> Tensor:
    """A factor of rows with 0 for those without keys, where a mode may have divided by 0 or met NaN in q.

    Nor does a sequence without keys need a descale.
    """
    return torch.where(visibility.attending_rows(), factor, 0)


def refuse_gradients(call: str, /, **tensors: Any) -> None:
    """Raise where one of these tensors would have to carry a derivative of a `call`."""
    has_tangents = in_forward_mode()
    if not (torch.is_grad_enabled() or has_tangents):
        return
    for name, x in tensors.items():
        if isinstance(x, Tensor) and (x.requires_grad or has_tangents):
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
    call = resolve(request, choose(request))
    found, terms = ops.attention(call), call.terms
    largest = capped = cast(Tensor, found.max_logit)
    softcap = terms.softcap_of_rows()
    if softcap is not None and not terms.bias_after_softcap:
        capped = softcap * torch.tanh(largest / softcap)
    biases = {name: getattr(terms, name) for name in ADDENDS}
    hiding = {name: torch.where(x == -torch.inf, x, 0) for name, x in biases.items() if x is not None}
    if hiding:
        plain = call.changed(terms=terms.changed(**hiding, bias_after_softcap=False))
        largest = cast(Tensor, ops.attention(plain).max_logit)
    return ObservedRows(largest, torch.exp(capped - found.lse), cast(Tensor, found.entropy))
