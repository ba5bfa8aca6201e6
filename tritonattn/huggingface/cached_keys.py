"""Statistics of cached keys for the attention function: from the record of a recording cache layer."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import cache_utils

from ..cache_statistics import KeyStatistics
from ..scaling import Scales, Scaling
from ..statistics import Statistics
from ..visibility import Visibility
from .recording import RECORDING

CACHE = "tritonattn_cache"  # the keyword argument by which a module's cache reaches the attention function


def offer_cache(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]] | None:
    """A forward pre-hook of an attention module: passes the cache of the call on to the attention function."""
    if torch.is_grad_enabled() or torch.compiler.is_compiling():
        return None
    for value in (*kwargs.values(), *args):
        if isinstance(value, (cache_utils.Cache, cache_utils.EncoderDecoderCache)):
            return args, {**kwargs, CACHE: value}
    return None


def with_cached_keys(scaling: Any, module: nn.Module, key: Tensor, cache: Any) -> Any:
    """The scaling, asking the record of the cache layer that holds key [B, Hkv, K, D], where there is one."""
    if cache is None or not isinstance(scaling, Scaling) or torch.is_grad_enabled() or torch.compiler.is_compiling():
        return scaling
    layer = _layer_of(cache, getattr(module, "layer_idx", None), key)
    return scaling if layer is None else _AskingCache(scaling, layer)


def _layer_of(cache: Any, index: Any, key: Tensor) -> Any:
    """The layer whose keys are this very tensor, made to keep a record; None where its class is not known."""
    parts = (getattr(cache, name, None) for name in ("self_attention_cache", "cross_attention_cache"))
    for part in (cache, *parts):
        layers = getattr(part, "layers", None)
        if not isinstance(index, int) or not layers or index >= len(layers):
            continue
        layer = layers[index]
        if getattr(layer, "keys", None) is key:
            if type(layer) in RECORDING:
                layer.__class__ = RECORDING[type(layer)]
            return layer if type(layer) in RECORDING.values() else None
    return None


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
    """Statistics of the visible keys from a record of the first Sk keys, which is made when first asked for."""

    def __init__(self, k: Tensor, visibility: Visibility, layer: Any) -> None:
        super().__init__(k, visibility)
        self._layer = layer

    def _lengths(self) -> Tensor:
        lengths = self._record().lengths[..., : self.visibility.k_len]
        return lengths if self.visibility.is_full else torch.where(self.visibility.seen_keys(), lengths, 0)

    def _length_sum(self) -> Tensor:
        record = self._record()
        return self._sum(record.lengths, record.length_sums).to(record.lengths.dtype)

    def _length_square_sum(self) -> Tensor:
        record = self._record()
        return self._sum(record.lengths.double().square(), record.square_sums)

    def _sum(self, values: Tensor, prefix: Tensor) -> Tensor:
        keys = self.visibility.k_len
        if self.visibility.mask is not None:
            return self.visibility.sum(values[..., :keys])
        return self.visibility.sum_from_prefix(values[..., :keys], prefix[..., : keys + 1])

    def _record(self) -> KeyStatistics:
        return self._layer.key_statistics()
