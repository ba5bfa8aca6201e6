"""The terms of a call's logits: its scaling and gain as a number and vectors, and the bias of keys."""

from __future__ import annotations

import torch
from torch import Tensor

from ..core.call import AttentionCall, Logits
from ..core.statistics import DoubleStatistics, Statistics
from ..core.visibility import Visibility
from ..scaling import SCALINGS, Scales, Scaling
from .checks import FLOATS, broadcasts, check_factor, check_key_bias, check_number, scale_dtype, shape_of


def logits(call: AttentionCall, statistics: Statistics, k: Tensor | None = None) -> Logits:
    """Compute the terms of the logits of a checked call: the scaling's scales times the gain, its bias and key_bias.

    statistics   of the keys that its rows see
    k            stands for call.k before the scaling, or None
    """
    q, (_, _, _, bias, softcap, sinks) = call.q, call.logits
    scales = scales_of(call.scaling, call.gain, q, call.k if k is None else k, call.visibility, statistics)
    if bias is not None:
        bias = _per_group(bias.to(scale_dtype(q)), call.visibility)
    if scales.key_bias is not None:
        own = _per_group(scales.key_bias.to(scale_dtype(q)), call.visibility)
        bias = own if bias is None else own + bias
    return Logits(scales.constant, scales.query, scales.key, bias, softcap, sinks)


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
        is_own = type(scaling) is SCALINGS.get(getattr(scaling, "name", ""))
        statistics = DoubleStatistics(statistics) if is_own else statistics
    scales = scaling.scales(q, k, visibility, statistics)
    name = f"{getattr(scaling, 'name', type(scaling).__name__)}.scales()"
    if not isinstance(scales, Scales):
        raise TypeError(f"{name}: expected Scales, got {type(scales).__name__}")
    constant, query, key = scales.constant, scales.query, scales.key
    check_number(f"{name}.constant", constant)
    rows, kv_heads = (visibility.batch, visibility.q_heads, visibility.q_len), visibility.kv_heads
    if query is not None:
        if isinstance(query, Tensor) and query.dim() > 1 and 1 < query.shape[-2] == kv_heads != visibility.q_heads:
            check_factor(f"{name}.query", query, q, (rows[0], kv_heads, rows[2]), "[B, Hkv, Sq]")
            query = visibility.repeated(query)
        else:
            check_factor(f"{name}.query", query, q, rows, "[B, Hq, Sq]")
        if not (scales.is_finite or visibility.every_row_sees):
            query = _where_seeing(visibility, query)
    if isinstance(gain, Tensor):
        gain = gain if visibility.every_row_sees else _where_seeing(visibility, gain)
        query = gain if query is None else query * gain
    elif gain is not None:
        constant = constant * gain
        check_number(f"{name}.constant * gain", constant)
    if key is not None:
        check_factor(f"{name}.key", key, q, visibility.keys, "[B, Hkv, Sk]")
    if scales.key_bias is not None:
        check_key_bias(f"{name}.key_bias", scales.key_bias, q, visibility.keys, "[B, Hq or Hkv, Sk]")
    if query is None and key is None and gain is None:
        return scales
    if not exact:
        query = query if query is None else _expanded(query, q, rows)
        key = key if key is None else _expanded(key, q, visibility.keys)
    return Scales(constant, query, key, key_bias=scales.key_bias)


def dense(call: AttentionCall, k: Tensor | None = None) -> tuple[Tensor | float, Tensor | None]:
    """The factor and the bias of every pair of a checked call by its scaling's formulas, for the reference.

    k   as in `logits`
    """
    q, scaling, visibility, gain = call.q, call.scaling, call.visibility, call.gain
    group = visibility.q_heads // visibility.kv_heads
    visible = visibility.dense()
    seen, sees = visible.any(-2)[..., None], visible.any(-1)  # [B, Hq, Sk, 1], [B, Hq, Sq]
    keys = torch.where(seen, (call.k if k is None else k).repeat_interleave(group, dim=1), 0)
    queries, pairs = torch.where(sees[..., None], q, 0), (*visibility.rows, visibility.k_len)
    factor, bias = scaling.multiplier(queries, keys, visible), scaling.addend(queries, keys, visible)
    if isinstance(factor, Tensor):
        _check_dense(scaling, "multiplier", factor, pairs)
    else:
        check_number(f"{type(scaling).__name__}.multiplier()", factor)
    if bias is not None:
        _check_dense(scaling, "addend", bias, pairs)
    if call.logits.key_bias is not None:
        given = _per_group(call.logits.key_bias, visibility).flatten(1, 2)[:, :, None].to(scale_dtype(q))
        bias = given if bias is None else bias + given
    if gain is not None:
        factor = factor * (torch.where(sees, gain, 0)[..., None] if isinstance(gain, Tensor) else gain)
    return factor, bias


def _expanded(scale: Tensor, q: Tensor, shape: tuple[int, ...]) -> Tensor:
    """A scale in the dtype in which it acts beside q, and of a shape to which it broadcasts."""
    if scale.dtype != torch.float32 or q.dtype == torch.float64:
        scale = scale.to(torch.promote_types(q.dtype, torch.float32))
    is_whole = scale.dim() == len(shape) and scale.shape == shape  # tuples compare sizes first, and tracing binds them
    return scale if is_whole else scale.expand(shape)


def _per_group(bias: Tensor, visibility: Visibility) -> Tensor:
    """A bias as [B, Hkv, Hq / Hkv, Sk], from one with a row a query head or a row a key head."""
    batch, kv_heads, k_len = visibility.keys
    group = visibility.q_heads // max(kv_heads, 1)
    if bias.dim() > 1:
        by_key_head = bias.shape[-2] in (1, kv_heads)
        bias = bias.unsqueeze(-2) if by_key_head else bias.unflatten(-2, (kv_heads, group))
    return bias.expand(batch, kv_heads, group, k_len)


def _where_seeing(visibility: Visibility, query: Tensor) -> Tensor:
    """A query scale with 0 for rows without keys, where a mode may have divided by 0 or met NaN in q."""
    return torch.where(visibility.once("seeing rows", visibility.seeing_rows), query, 0)


def _check_dense(scaling: Scaling, method: str, factor: Tensor, shape: tuple[int, ...]) -> None:
    """Raise unless a mode's dense formula `method` returned a floating tensor for every pair."""
    name = f"{type(scaling).__name__}.{method}()"
    if factor.dtype not in FLOATS:
        raise TypeError(f"{name}: expected a floating dtype, got {factor.dtype}")
    if not broadcasts(factor.shape, shape):
        raise ValueError(
            f"{name}: expected a shape broadcastable to [B, Hq, Sq, Sk] = {list(shape)}, got {shape_of(factor)}"
        )
