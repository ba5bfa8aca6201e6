"""Calls in which one kernel does the work, and their check against the reference."""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
from torch import Tensor

from .. import reference, triton_backend
from ..call import AttentionCall, Gradients
from ..decode_call import Cache, DecodeCall
from ..tuning.table import Key
from ..visibility import Visibility

_COPIES = 3
# By kernel: what of the backward is asked for. The row terms, a small part of the work, come with both.
_NEEDS = {"grad_query": Gradients(True, False, False), "grad_key_value": Gradients(False, True, True)}


@dataclass(frozen=True)
class Size:
    """batch sequences of `length` tokens; heads of queries, of which `group` share a key head."""

    batch: int
    heads: int
    length: int
    group: int = 1


def typical_size(key: Key, length: int | None = None) -> Size:
    """What a key is timed with: about as many tokens whatever the length."""
    if key.kernel == "decode":
        length = length or (1024 if key.lengths == "short" else 16384)
        return Size(max(1, 2**18 // length), 32, length, 4)
    length = length or (512 if key.lengths == "short" else 4096)
    return Size(max(1, 2**14 // length), 16, length)


class Workload:
    """A key's kernel on random operands, causal; several copies of them, so that rounds find cold caches."""

    def __init__(self, key: Key, size: Size, dtype: torch.dtype, device: torch.device, copies: int = _COPIES) -> None:
        self.key, self.size, self.dtype, self.device = key, size, dtype, device
        self._calls = [self._call(seed) for seed in range(copies)]

    def __call__(self, number: int) -> tuple[Tensor, ...]:
        """Launch with the next copy, by the config in use; the results of the kernel."""
        call = self._calls[number % len(self._calls)]
        if isinstance(call, DecodeCall):
            return (triton_backend.decode(call, aux=False).out,)
        if self.key.kernel == "forward":
            return (triton_backend.forward(call, aux=False).out,)
        out, lse = self._forward(number % len(self._calls))
        gradients = triton_backend.backward(call, out, lse, self._d_out(call), None, _NEEDS[self.key.kernel])
        return tuple(x for x in gradients if x is not None)

    def error(self) -> str | None:
        """None if the results for the first heads are those of the reference, else what is wrong."""
        found = [self._first_heads(x) for x in self(0)]
        exact, eager = (self._reference(dtype) for dtype in (torch.float64, self.dtype))
        for number, (ours, wanted, rounded) in enumerate(zip(found, exact, eager, strict=True)):
            band = torch.finfo(self.dtype).eps * (16 if self.dtype == torch.float32 else 1)
            allowed = 2 * (rounded.double() - wanted).abs().max() + band * wanted.abs().max()
            error = (ours.double() - wanted).abs().max()
            if not error <= allowed:  # NaN too
                return f"result {number}: expected an error of at most {allowed:.2e}, got {error:.2e}"
        return None

    def _first_heads(self, x: Tensor) -> Tensor:
        """Of the first sequence, the query heads of the first key head, or that key head."""
        return x[:1, : self.size.group if x.shape[1] == self.size.heads else 1]

    @functools.cached_property
    def _forwards(self) -> dict[int, tuple[Tensor, Tensor]]:
        return {}

    def _forward(self, copy: int) -> tuple[Tensor, Tensor]:
        if copy not in self._forwards:
            self._forwards[copy] = triton_backend.forward(self._calls[copy], aux=False)[:2]
        return self._forwards[copy]

    def _d_out(self, call: AttentionCall) -> Tensor:
        return call.q if call.q.shape[3] == call.v.shape[3] else torch.zeros_like(call.q[..., : call.v.shape[3]])

    def _call(self, seed: int) -> AttentionCall | DecodeCall:
        size, dim = self.size, self.key.head_dim
        random = torch.Generator(self.device).manual_seed(seed)

        def normal(*shape: int, dtype: torch.dtype = self.dtype) -> Tensor:
            return torch.randn(shape, generator=random, device=self.device, dtype=torch.float32).to(dtype)

        rows = 1 if self.key.kernel == "decode" else size.length
        q = normal(size.batch, size.heads, rows, dim)
        k, v = (normal(size.batch, size.heads // size.group, size.length, dim) for _ in range(2))
        scales = (
            None if self.key.scales == "none" else normal(*q.shape[:3], dtype=torch.float32),
            None if self.key.scales != "query+key" else normal(*k.shape[:3], dtype=torch.float32),
        )
        if self.key.kernel == "decode":
            lengths = torch.full((size.batch,), size.length, device=self.device, dtype=torch.int32)
            return DecodeCall(q, Cache(k, v, lengths), dim**-0.5, *scales, None, None, None)
        return AttentionCall(q, k, v, Visibility.of(q, k, causal=True), dim**-0.5, *scales)

    def _reference(self, dtype: torch.dtype) -> list[Tensor]:
        """The results of the first heads, computed eagerly in a dtype."""
        call = self._calls[0]
        k, v = (call.cache.k, call.cache.v) if isinstance(call, DecodeCall) else (call.k, call.v)
        q, k, v = (self._first_heads(x).to(dtype).requires_grad_() for x in (call.q, k, v))
        multiplier = torch.full((1, 1, 1, 1), call.scale, dtype=torch.promote_types(dtype, torch.float32)).to(q.device)
        if call.query_scale is not None:
            multiplier = multiplier * self._first_heads(call.query_scale)[..., None]
        if call.key_scale is not None:
            multiplier = multiplier * call.key_scale[:1, :1, None]
        visibility = Visibility.of(q, k, causal=self.key.kernel != "decode")
        out = reference.attention(q, k, v, multiplier, visibility).out
        if self.key.kernel not in _NEEDS:
            return [out.detach()]
        d_out = self._first_heads(self._d_out(call)).to(dtype)
        leaves = [x for x, needed in zip((q, k, v), _NEEDS[self.key.kernel], strict=False) if needed]
        return list(torch.autograd.grad(out, leaves, d_out))
