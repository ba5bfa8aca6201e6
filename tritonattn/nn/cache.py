"""A contiguous KV cache with the statistics of its keys."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..calls.checks import FLOATS, check_count, check_dtype, check_tensor
from ..calls.key_statistics import KeyStatistics, described


class KeyValueCache:
    """The keys and values of B sequences of different lengths, for `ScaledAttention(..., cache=)`.

        k            [B, Hkv, capacity, D]      the first lengths[b] of sequence b count
        v            [B, Hkv, capacity, Dv]
        lengths      [B]                        int64
        statistics   `KeyStatistics` of k

    Args:
        batch: B.
        kv_heads: Hkv.
        capacity: The keys that a sequence can hold.
        head_dim: D.
        value_dim: Dv; None is D.
        device, dtype: The device and dtype of k and v; None are torch's defaults.

    Buffers have fixed shapes and change in place, and nothing waits for the device: a step can be compiled and captured
    in a CUDA graph. On a GPU keys past the capacity are dropped, on a CPU they raise ValueError.

    Each layer needs a cache of its own: `ScaledAttention` refuses, unless compiled, one that another layer has filled
    since its last `reset`.

    Raises:
        TypeError, ValueError: An invalid size or dtype.

    >>> import torch, tritonattn
    >>> cache = tritonattn.nn.KeyValueCache(batch=1, kv_heads=2, capacity=16, head_dim=8)
    >>> cache.append(torch.randn(1, 2, 3, 8), torch.randn(1, 2, 3, 8))
    >>> cache.lengths
    tensor([3])
    """

    _layer: nn.Module | None = None

    def __init__(
        self,
        batch: int,
        kv_heads: int,
        capacity: int,
        head_dim: int,
        value_dim: int | None = None,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        value_dim = head_dim if value_dim is None else value_dim
        for name, size in (("head_dim", head_dim), ("value_dim", value_dim)):
            check_count(name, size, 1)
        check_dtype(dtype)
        dtype = torch.get_default_dtype() if dtype is None else dtype
        self.statistics = KeyStatistics(
            batch, kv_heads, capacity, device=device, dtype=torch.promote_types(dtype, torch.float32)
        )
        # One more entry at the end, where what is dropped goes.
        self._k = torch.zeros(batch, kv_heads, capacity + 1, head_dim, device=device, dtype=dtype)
        self._v = torch.zeros(batch, kv_heads, capacity + 1, value_dim, device=device, dtype=dtype)

    def __repr__(self) -> str:
        (batch, kv_heads, _, head_dim), value_dim = self._k.shape, self._v.shape[3]
        sizes = f"{batch=}, {kv_heads=}, capacity={self.capacity}, {head_dim=}, {value_dim=}"
        return described(self, sizes, self._k, self.lengths)

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_layer": None}  # a copy goes on with any layer

    @property
    def k(self) -> Tensor:
        return self._k[:, :, :-1]

    @property
    def v(self) -> Tensor:
        return self._v[:, :, :-1]

    @property
    def lengths(self) -> Tensor:
        return self.statistics.counts

    @property
    def capacity(self) -> int:
        return self.statistics.capacity

    def claim(self, layer: nn.Module) -> None:
        """Note the layer that fills this cache; raise ValueError where that is another one. Compiled code does not."""
        if torch.compiler.is_compiling():
            return
        if self._layer is not None and self._layer is not layer:
            raise ValueError(
                "cache: expected one that this layer alone fills, got one with keys of another layer; each layer needs"
                " its own, as of layer.cache(batch, capacity)"
            )
        self._layer = layer

    @torch.no_grad()
    def append(self, k_new: Tensor, v_new: Tensor, counts: Tensor | None = None) -> None:
        """Write the next keys [B, Hkv, n, D] and values [B, Hkv, n, Dv] of every sequence.

        Args:
            k_new, v_new: The keys and values, which are converted to the cache's dtype.
            counts: Integers [B]: how many of the n are those of sequence b, the first ones; None is all.

        Raises:
            TypeError, ValueError: As `KeyStatistics.append`; keys or values that do not match the cache.
        """
        self._check_new("k_new", k_new, self._k, "[B, Hkv, n, D]")
        self._check_new("v_new", v_new, self._v, "[B, Hkv, n, Dv]")
        if v_new.shape[2] != k_new.shape[2]:
            raise ValueError(f"v_new: expected k_new's n = {k_new.shape[2]}, got {v_new.shape[2]}")
        position = self.lengths[:, None] + torch.arange(k_new.shape[2], device=self.lengths.device)  # [B, n]
        position = position.clamp(max=self.capacity)[:, None, :, None]
        k_new = k_new.to(self._k.dtype)  # the statistics are those of the keys as stored
        self.statistics.append(k_new, counts)  # checks counts and room, and moves lengths on
        for buffer, new in ((self._k, k_new), (self._v, v_new)):
            buffer.scatter_(2, position.expand_as(new), new.to(buffer.dtype))

    def _check_new(self, name: str, new: Any, buffer: Tensor, axes: str) -> None:
        """Raise unless these are floats that fit into their buffer, whatever their n."""
        batch, kv_heads, _, size = buffer.shape
        check_tensor(name, new, axes, FLOATS, buffer, "this KeyValueCache", (batch, kv_heads, None, size))

    @torch.no_grad()
    def reorder(self, index: Tensor) -> None:
        """Let sequence b continue from the tokens of sequence index[b], as beam search does."""
        self.statistics.reorder(index)
        index = index.long().clamp(0, max(len(self.lengths) - 1, 0))
        for buffer in (self._k, self._v):
            buffer.copy_(buffer.index_select(0, index))

    def truncate(self, lengths: Tensor | int) -> None:
        """Keep the first keys of every sequence, as when guessed tokens are rejected."""
        self.statistics.truncate(lengths)

    def reset(self) -> None:
        """Forget all keys, and the layer that they came from."""
        self.statistics.reset()
        self._layer = None
