"""Calls in which one kernel does the work, and their check against the reference."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.utils.deterministic
from torch import Tensor

from ..backends import reference
from ..backends import triton as triton_backend
from ..core.call import AttentionCall, Logits, Needs
from ..core.decode_call import Cache, DecodeCall
from ..core.visibility import Visibility
from ..tuning.table import Key

_COPIES = 3
_FIRST, _LAST = slice(0, 1), slice(-1, None)


@dataclass(frozen=True)
class Size:
    """A batch of sequences of `length` tokens, with query heads, of which `group` share a key head."""

    batch: int
    heads: int
    length: int
    group: int = 1


def typical_size(key: Key, length: int | None = None) -> Size:
    """Choose the size that a key is timed with: about as many tokens for every length."""
    if key.kernel == "decode":
        length = length or (1024 if key.lengths == "short" else 16384)
        return Size(max(1, 2**18 // length), 32, length, 4)
    length = length or (512 if key.lengths == "short" else 4096)
    return Size(max(1, 2**14 // length), 16, length)


class Workload:
    """A key's kernel on random causal operands; several copies of them, so that rounds find cold caches."""

    def __init__(self, key: Key, size: Size, dtype: torch.dtype, device: torch.device, copies: int = _COPIES) -> None:
        self.key, self.size, self.dtype, self.device = key, size, dtype, device
        self._calls = [self._call(seed) for seed in range(copies)]
        self._forwards: dict[int, tuple[Tensor, Tensor, Tensor | None]] = {}

    def __call__(self, number: int) -> tuple[Tensor, ...]:
        """Launch with the next copy in the config in use, and return the kernel's results."""
        call = self._calls[number % len(self._calls)]
        if isinstance(call, DecodeCall):
            return (triton_backend.decode(call, aux=False).out,)
        if not any(self._needs):
            return self._forward(call)[:1]
        copy = number % len(self._calls)
        if copy not in self._forwards:
            self._forwards[copy] = self._forward(call)
        out, lse, rounding = self._forwards[copy]
        gradients = triton_backend.backward(call, out, lse, call.q, None, self._needs, rounding)
        return tuple(x for x in gradients if x is not None)

    def error(self) -> str | None:
        """Compare the results of the first and the last heads with the reference; return what is wrong, or None."""
        with _poisoned_memory():
            found = self(0)
        for end in (_FIRST, _LAST):
            exact, eager = (self._reference(dtype, end) for dtype in (torch.float64, self.dtype))
            for number, (result, wanted, rounded) in enumerate(zip(found, exact, eager, strict=True)):
                band = torch.finfo(self.dtype).eps * (16 if self.dtype == torch.float32 else 1)
                allowed = 2 * (rounded.double() - wanted).abs().max() + band * wanted.abs().max()
                error = (self._heads(result, end).double() - wanted).abs().max()
                if not error <= allowed:  # NaN too
                    return f"result {number}: expected an error of at most {allowed:.2e}, got {error:.2e}"
        return None

    def _heads(self, x: Tensor, end: slice) -> Tensor:
        """Take the first key head of the first sequence, or the last of the last, or the query heads that share it."""
        by_key_head = x.unflatten(1, (self.size.heads // self.size.group, -1))
        return by_key_head[end, end].flatten(1, 2)

    @property
    def _needs(self) -> Needs:
        """Say which gradients are computed; the row terms, a small part of the work, come with either kernel."""
        of_query, of_key = self.key.kernel == "grad_query", self.key.kernel == "grad_key_value"
        of_query_scale = of_query and self.key.problem.query_scale_grad
        return Needs(of_query, of_key, of_key, of_query_scale, of_key and self.key.problem.key_scale)

    def _forward(self, call: AttentionCall) -> tuple[Tensor, Tensor, Tensor | None]:
        """out, lse, and of 16 bits what out lost when it was rounded, as training keeps it."""
        rounding = torch.empty_like(call.q, dtype=torch.int8) if self.dtype.itemsize == 2 else None
        return *triton_backend.forward(call, False, rounding)[:2], rounding

    def _call(self, seed: int) -> AttentionCall | DecodeCall:
        size, dim = self.size, self.key.head_dim
        random = torch.Generator(self.device).manual_seed(seed)

        def normal(*shape: int, dtype: torch.dtype = self.dtype) -> Tensor:
            return torch.randn(shape, generator=random, device=self.device, dtype=torch.float32).to(dtype)

        rows = 1 if self.key.kernel == "decode" else size.length
        q = normal(size.batch, size.heads, rows, dim)
        k, v = (normal(size.batch, size.heads // size.group, size.length, dim) for _ in range(2))
        problem = self.key.problem
        logits = Logits(
            dim**-0.5,
            normal(*q.shape[:3], dtype=torch.float32) if problem.query_scale else None,
            normal(*k.shape[:3], dtype=torch.float32) if problem.key_scale else None,
        )
        if self.key.kernel == "decode":
            lengths = torch.full((size.batch,), size.length, device=self.device, dtype=torch.int32)
            return DecodeCall(q, Cache(k, v, lengths), logits)
        return AttentionCall(q, k, v, Visibility.of(q, k, causal=True), logits)

    def _reference(self, dtype: torch.dtype, end: slice) -> list[Tensor]:
        """Compute the results of the first or the last heads eagerly in a dtype."""
        call = self._calls[0]
        k, v = (call.cache.k, call.cache.v) if isinstance(call, DecodeCall) else (call.k, call.v)
        q, k, v = (self._heads(x, end).to(dtype).requires_grad_() for x in (call.q, k, v))
        wide = torch.promote_types(dtype, torch.float32)
        query_scale, key_scale = (
            None if x is None else self._heads(x, end).to(wide).requires_grad_()
            for x in (call.logits.query_scale, call.logits.key_scale)
        )
        multiplier = torch.full((1, 1, 1, 1), call.logits.scale, dtype=wide, device=q.device)
        if query_scale is not None:
            multiplier = multiplier * query_scale[..., None]
        if key_scale is not None:
            multiplier = multiplier * key_scale[:, :, None]
        visibility = Visibility.of(q, k, causal=self.key.kernel != "decode")
        out = reference.attention(q, k, v, multiplier, visibility).out
        pairs = zip((q, k, v, query_scale, key_scale), self._needs, strict=False)
        leaves = [x for x, needed in pairs if x is not None and needed]
        return list(torch.autograd.grad(out, leaves, q.detach())) if leaves else [out.detach()]


@contextmanager
def _poisoned_memory() -> Iterator[None]:
    """Fill fresh memory with NaN inside the context, so that a kernel that skips a result shows."""
    settings: Any = torch.utils.deterministic
    before = torch.get_deterministic_debug_mode(), settings.fill_uninitialized_memory
    torch.set_deterministic_debug_mode("warn")
    settings.fill_uninitialized_memory = True
    try:
        yield
    finally:
        torch.set_deterministic_debug_mode(before[0])
        settings.fill_uninitialized_memory = before[1]
