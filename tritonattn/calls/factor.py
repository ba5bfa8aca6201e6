"""The factor of q . k that a call asks for: a scaling in any of its forms, and the gain on it."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..core.call import Logits
from ..core.shards import unshard
from ..core.statistics import DoubleStatistics, Statistics
from ..core.visibility import Visibility
from ..scaling import SCALINGS, Scales, Scaling
from .checks import (
    check_dense,
    check_factor,
    check_key_bias,
    check_number,
    check_tensor,
    named_scaling,
    refuse_scaling,
)


def scale_dtype(q: Tensor) -> torch.dtype:
    """The dtype of scales, gains and sinks: float32, float64 for float64 q."""
    return torch.promote_types(q.dtype, torch.float32)


@dataclass(frozen=True, eq=False)
class Factor:
    """gain[i] * (the factor of a mode). A tensor as gain broadcasts to [B, Hq, Sq]."""

    scaling: Scaling
    gain: float | Tensor | None = None

    @classmethod
    def of(
        cls,
        scaling: str | Scaling | float | Tensor,
        gain: float | Tensor | None,
        q: Tensor,
        rows: tuple[int, ...],
        axes: str,
    ) -> Factor:
        """Check the arguments and build the factor; tensors must broadcast to the shape `rows`, named `axes`."""
        if isinstance(scaling, str):
            mode = named_scaling(scaling)
        elif isinstance(scaling, Scaling):
            mode = scaling
            if isinstance(scaling, nn.Module):
                unshard(scaling)
        elif isinstance(scaling, Tensor):
            check_factor("scaling", scaling, q, rows, axes)
            mode = Given(1.0, scaling.to(scale_dtype(q)))
        else:
            if isinstance(scaling, bool) or not isinstance(scaling, (int, float)):
                refuse_scaling(scaling)
            check_number("scaling", scaling)
            mode = Given(scaling)
        if isinstance(gain, Tensor):
            check_factor("gain", gain, q, rows, axes)
            gain = gain.to(scale_dtype(q))
        elif gain is not None:
            check_number("gain", gain)
        return cls(mode, gain)

    def logits(
        self,
        q: Tensor,
        k: Tensor,
        visibility: Visibility,
        statistics: Statistics,
        key_bias: Tensor | None = None,
        softcap: float | None = None,
        sinks: Tensor | None = None,
    ) -> Logits:
        """The terms of the logits: the mode's scales times the gain, its bias and key_bias added up, and the rest.

        key_bias   broadcastable to [B, Hq, Sk] or [B, Hkv, Sk], or None
        """
        scales, bias = self.scales(q, k, visibility, statistics), None
        for given in (scales.key_bias, key_bias):
            if given is not None:
                part = _per_group(given.to(scale_dtype(q)), visibility)
                bias = part if bias is None else bias + part
        return Logits(scales.constant, scales.query, scales.key, bias, softcap, sinks)

    def scales(self, q: Tensor, k: Tensor, visibility: Visibility, statistics: Statistics) -> Scales:
        """The mode's scales times the gain, as a float, [B, Hq, Sq] and [B, Hkv, Sk], and its bias as it is."""
        take = self.exact_scales if isinstance(self.gain, Tensor) else self._scales
        scales = take(q, k, visibility, statistics)
        query, key = scales.query, scales.key
        if query is None and key is None:
            return scales
        dtype = scale_dtype(q)
        if query is not None:
            query = _expanded(query, dtype, visibility.rows)
        if key is not None:
            key = _expanded(key, dtype, visibility.keys)
        return Scales(scales.constant, query, key, key_bias=scales.key_bias)

    def exact_scales(self, q: Tensor, k: Tensor, visibility: Visibility, statistics: Statistics) -> Scales:
        """Scales in fp64, neither rounded nor expanded, of a mode of `SCALINGS`, for a mode that combines others."""
        is_own = type(self.scaling) is SCALINGS.get(getattr(self.scaling, "name", ""))
        wide = DoubleStatistics(statistics) if is_own else statistics
        return self._scales(q, k, visibility, wide)

    def _scales(self, q: Tensor, k: Tensor, visibility: Visibility, statistics: Statistics) -> Scales:
        scales = self.scaling.scales(q, k, visibility, statistics)
        name = f"{getattr(self.scaling, 'name', type(self.scaling).__name__)}.scales()"
        if not isinstance(scales, Scales):
            raise TypeError(f"{name}: expected Scales, got {type(scales).__name__}")
        check_number(f"{name}.constant", scales.constant)
        constant, query, key, gain = scales.constant, scales.query, scales.key, self.gain
        if query is not None:
            query = _per_query_head(f"{name}.query", query, q, visibility)
            query = query if scales.is_finite else _where_seeing(visibility, query)
        if isinstance(gain, Tensor):
            gain = _where_seeing(visibility, gain)
            query = gain if query is None else query * gain
        elif gain is not None:
            constant = constant * gain
            check_number(f"{name}.constant * gain", constant)
        if key is not None:
            check_factor(f"{name}.key", key, q, visibility.keys, "[B, Hkv, Sk]")
        if scales.key_bias is not None:
            check_key_bias(f"{name}.key_bias", scales.key_bias, q, visibility.keys, "[B, Hq or Hkv, Sk]")
        if query is None and gain is None:
            return scales
        return Scales(constant, query, key, key_bias=scales.key_bias)

    def dense(
        self, q: Tensor, k: Tensor, visibility: Visibility, key_bias: Tensor | None = None
    ) -> tuple[Tensor | float, Tensor | None]:
        """The factor and the bias of every pair by the mode's formulas, for the reference; key_bias as of `logits`."""
        group = visibility.q_heads // visibility.kv_heads
        visible = visibility.dense()
        seen, sees = visible.any(-2)[..., None], visible.any(-1)  # [B, Hq, Sk, 1], [B, Hq, Sq]
        keys = torch.where(seen, k.repeat_interleave(group, dim=1), 0)
        queries, pairs = torch.where(sees[..., None], q, 0), (*visibility.rows, visibility.k_len)
        factor = self.scaling.multiplier(queries, keys, visible)
        bias = self.scaling.addend(queries, keys, visible)
        if isinstance(factor, Tensor):
            check_dense(self.scaling, "multiplier", factor, pairs)
        else:
            check_number(f"{type(self.scaling).__name__}.multiplier()", factor)
        if bias is not None:
            check_dense(self.scaling, "addend", bias, pairs)
        if key_bias is not None:
            given = _per_group(key_bias, visibility).flatten(1, 2)[:, :, None].to(scale_dtype(q))
            bias = given if bias is None else bias + given
        if self.gain is not None:
            factor = factor * (
                torch.where(sees, self.gain, 0)[..., None] if isinstance(self.gain, Tensor) else self.gain
            )
        return factor, bias


class Given(Scaling):
    """A scaling whose scales are arguments."""

    name = "given"
    reads_keys = False

    def __init__(self, constant: float, query: Tensor | None = None, key: Tensor | None = None) -> None:
        self._scales = Scales(constant, query, key)

    def scales(self, q: Tensor, k: Tensor, visibility: Visibility, statistics: Statistics) -> Scales:
        return self._scales

    def multiplier(self, q: Tensor, k: Tensor, visible: Tensor) -> Tensor | float:
        factor, (query, key) = self._scales.constant, (self._scales.query, self._scales.key)
        if query is not None:
            factor = factor * query[..., None]
        if key is not None:
            if key.dim() > 1 and key.shape[-2] > 1:
                key = key.repeat_interleave(k.shape[1] // key.shape[-2], dim=-2)  # one row a query head
            key = key[..., None, :] if key.dim() else key
            factor = factor * torch.where(visible, key, 0)  # that of a key which no row sees may be NaN
        return factor


def _expanded(scale: Tensor, dtype: torch.dtype, shape: tuple[int, ...]) -> Tensor:
    if scale.dtype != dtype:
        scale = scale.to(dtype)
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
    if visibility.every_row_sees:
        return query
    return torch.where(visibility.once("seeing rows", visibility.seeing_rows), query, 0)


def _per_query_head(name: str, query: Tensor, q: Tensor, visibility: Visibility) -> Tensor:
    """A query scale broadcastable to [B, Hq, Sq], from one that may have a row a key head."""
    (batch, q_heads, q_len), kv_heads = visibility.rows, visibility.kv_heads
    check_tensor(name, query, "[B, Hq, Sq]")
    if query.dim() > 1 and 1 < query.shape[-2] == kv_heads != q_heads:
        check_factor(name, query, q, (batch, kv_heads, q_len), "[B, Hkv, Sq]")
        return visibility.repeated(query)
    check_factor(name, query, q, visibility.rows, "[B, Hq, Sq]")
    return query
