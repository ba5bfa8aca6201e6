"""Statistics of cached keys for the attention function: from the record of a recording cache layer."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import cache_utils

from ..core.statistics import Statistics
from ..core.visibility import Visibility
from ..scaling import Scales, Scaling
from .recording import RECORDING
from .settings import layer_scaling

CACHE = "tritonattn_cache"  # the keyword argument by which a module's cache reaches the attention function


def offer_cache(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]] | None:
    """A forward pre-hook of an attention module: passes the cache of the call on to the attention function."""
    if torch.is_grad_enabled() or torch.compiler.is_compiling():
        return None
    for value in (*kwargs.values(), *args):
        if isinstance(value, (cache_utils.Cache, cache_utils.EncoderDecoderCache)):
            if isinstance(layer_scaling(module).scaling, Scaling):
                for layer in _layers_of(value, getattr(module, "layer_idx", None)):
                    _record_from_now_on(layer)
            return args, {**kwargs, CACHE: value}
    return None


def with_cached_keys(scaling: Any, module: nn.Module, key: Tensor, cache: Any) -> Any:
    """The scaling, asking the record of the cache layer that holds key [B, Hkv, K, D], where there is one."""
    if cache is None or not isinstance(scaling, Scaling) or torch.is_grad_enabled() or torch.compiler.is_compiling():
        return scaling
    layer = _layer_of(cache, getattr(module, "layer_idx", None), key)
    return scaling if layer is None else _AskingCache(scaling, layer)


def _layer_of(cache: Any, index: Any, key: Tensor) -> Any:
    """The layer whose last update returned this very tensor; None where its class is not known."""
    for layer in _layers_of(cache, index):
        _record_from_now_on(layer)  # one that the update has made
        if type(layer) in RECORDING.values() and layer.gave(key):
            return layer
    return None


def _layers_of(cache: Any, index: Any) -> list[Any]:
    """The layers of a module's number, in the cache or in those that it is made of."""
    parts = (getattr(cache, name, None) for name in ("self_attention_cache", "cross_attention_cache"))
    lists = [getattr(part, "layers", None) or () for part in (cache, *parts)]
    return [layers[index] for layers in lists if isinstance(index, int) and 0 <= index < len(layers)]


def _record_from_now_on(layer: Any) -> None:
    if type(layer) in RECORDING:
        layer.__class__ = RECORDING[type(layer)]


class _AskingCache(Scaling):
    """A scaling whose statistics come from the record of a cache layer."""

    name = "asking_cache"

    def __init__(self, scaling: Scaling, layer: Any) -> None:
        self.scaling = scaling
        self.layer = layer

    def scales(self, q: Tensor, k: Tensor, visibility: Visibility, statistics: Statistics) -> Scales:
        return self.scaling.scales(q, k, visibility, _RecordedStatistics(k, visibility, self.layer))

    def multiplier(self, q: Tensor, k: Tensor, visible: Tensor) -> Tensor:
        return self.scaling.multiplier(q, k, visible)


class _RecordedStatistics(Statistics):
    """Statistics of the visible keys from a record of the keys, which is made when first asked for."""

    def __init__(self, k: Tensor, visibility: Visibility, layer: Any) -> None:
        super().__init__(k, visibility)
        self._layer = layer

    def _lengths(self) -> Tensor:
        lengths = self._kept()[0]
        return lengths if self.visibility.is_full else torch.where(self.visibility.seen_keys(), lengths, 0)

    def _length_sum(self) -> Tensor:
        lengths, sums, _ = self._kept()
        return self._sum(lengths, sums).to(lengths.dtype)

    def _length_square_sum(self) -> Tensor:
        lengths, _, sums = self._kept()
        return self._sum(lengths.double().square(), sums)

    def _sum(self, values: Tensor, prefix: Tensor) -> Tensor:
        if self.visibility.mask is not None:
            return self.visibility.sum(values)
        return self.visibility.sum_from_prefix(values, prefix)

    def _kept(self) -> tuple[Tensor, Tensor, Tensor]:
        """Of the record: lengths [B, Hkv, Sk], and the running sums [B, Hkv, Sk + 1] of lengths and their squares."""
        record, first = self._layer.key_statistics()
        end = first + self.visibility.k_len
        sums = [x[..., first : end + 1] for x in (record.length_sums, record.square_sums)]
        if first > 0:  # the keys before are forgotten
            sums = [x - x[..., :1] for x in sums]
        return record.lengths[..., first:end], *sums
