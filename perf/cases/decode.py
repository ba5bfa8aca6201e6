"""Cases of decoding: one new token per sequence against a KV cache, contiguous or in pages."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

import tritonattn

from .attention import DTYPES, OURS, entrant_name, head, our_rounding
from .check import Question, Sample, checker
from .contest import Contest, Entrant, Results, Unavailable
from .peers import SDPA_BACKENDS, package, require_16_bits, require_gpu
from .recipes import prescaled
from .roofline import COPY
from .work import Shape, decode_bytes, forward_flops

_PAGE = 256  # keys; flash-attn 2 takes multiples of it
_COPIES = 2
COUNTED = f"{OURS} with KeyStatistics"  # kept with the cache, so that no step reads old keys for its scale


@dataclass(frozen=True)
class Caches:
    """Full caches: q [B, Hq, 1, D]; k, v [B, Hkv, S, D], or pages [N, page, Hkv, D] with their table."""

    q: Tensor
    k: Tensor
    v: Tensor
    lengths: Tensor
    table: Tensor | None

    @property
    def sequences_first(self) -> tuple[Tensor, Tensor]:
        """k and v [B, S, Hkv, D], or the pages."""
        return (self.k, self.v) if self.table is not None else (self.k.transpose(1, 2), self.v.transpose(1, 2))


Step = Callable[[Caches], Tensor]


@dataclass(frozen=True)
class DecodeCase:
    """A decoding step; shape.k_len is the length of the caches."""

    shape: Shape
    dtype: str
    paged: bool
    scaling: str
    peers: tuple[str, ...]
    device: torch.device
    backend: str

    def contest(self) -> Contest:
        shape, dtype = self.shape, DTYPES[self.dtype]
        size = decode_bytes(shape, dtype)
        axes = {
            "length": shape.k_len,
            "head_dim": shape.head_dim,
            "dtype": self.dtype,
            "paged": self.paged,
            "scaling": self.scaling,
            "batch": shape.batch,
            "heads": shape.heads,
            "kv_heads": shape.kv_heads,
            "cache_bytes": size,
            "backend": self.backend,
        }
        return Contest("decode", axes, self.enter, COPY, self.device, forward_flops(shape), size)

    def enter(self) -> list[Entrant]:
        """Enter a copy that moves as many bytes, ours with and without KeyStatistics, and peers."""
        contiguous = [_contiguous(self.shape, DTYPES[self.dtype], self.device, seed) for seed in range(_COPIES)]
        samples = [self._sample(contiguous[0], position) for position in (0, -1)]
        caches = [_in_pages(cache) for cache in contiguous] if self.paged else contiguous
        steps: dict[str, Callable[[], Step]] = {OURS: lambda: self._ours(None)}
        if tritonattn.SCALINGS[self.scaling].about.reads_norms:
            steps[COUNTED] = lambda: self._ours(contiguous)
        steps |= {name: lambda name=name: self._peer(name) for name in self.peers}
        return [self._copy(), *(self._entrant(name, steps[name], caches, samples) for name in steps)]

    def _sample(self, cache: Caches, position: int) -> Sample:
        """Sample the query heads of one key head: 0 is the first of the first sequence, -1 the last of the last."""
        group = self.shape.heads // self.shape.kv_heads

        def part(out: Tensor) -> Tensor:
            return out[position][None].unflatten(1, (-1, group))[:, position]

        key_head = head(position)
        return Sample(Question(part(cache.q), key_head(cache.k), key_head(cache.v), None, causal=False), part)

    def _copy(self) -> Entrant:
        def prepare() -> Callable[[int], Results]:
            count = decode_bytes(self.shape, DTYPES[self.dtype]) // 2
            source, target = torch.zeros(2, count, dtype=torch.uint8, device=self.device)
            return lambda number: {"copy": target.copy_(source)}

        return Entrant(COPY, "", prepare, None)

    def _entrant(self, name: str, make: Callable[[], Step], caches: list[Caches], samples: list[Sample]) -> Entrant:
        ours = name in (OURS, COUNTED)
        rounding = our_rounding(self.backend, self.dtype) if ours else "operands"

        def prepare() -> Callable[[int], Results]:
            step = make()
            return lambda number: {"out": step(caches[number % _COPIES])}

        check = checker(samples, self.scaling, rounding)
        return Entrant(entrant_name(name, self.scaling), self.scaling, prepare, check, ours)

    def _ours(self, counted: list[Caches] | None) -> Step:
        """Make our step, with KeyStatistics for the given caches, found by their q's address, or without."""
        records = {}
        for cache in counted or ():
            record = tritonattn.KeyStatistics(*cache.k.shape[:3], device=self.device)
            record.append(cache.k)
            records[cache.q.data_ptr()] = record

        def step(cache: Caches) -> Tensor:
            return tritonattn.attention_decode(
                cache.q,
                cache.k,
                cache.v,
                key_lengths=cache.lengths,
                block_table=cache.table,
                scaling=self.scaling,
                statistics=records.get(cache.q.data_ptr()),
                backend=self.backend,
            )

        return step

    def _peer(self, name: str) -> Step:
        if name in SDPA_BACKENDS:
            return self._sdpa(SDPA_BACKENDS[name])
        if name == "flash-attn-2":
            return self._flash_attn("flash_attn", "block_table")
        if name == "flash-attn-3":
            return self._flash_attn("flash_attn_interface", "page_table")
        raise Unavailable("is not asked to decode: it has no call for a KV cache, or none that is public")

    def _sdpa(self, backend: SDPBackend | None) -> Step:
        if self.paged:
            raise Unavailable("takes no pages")
        if backend not in (None, SDPBackend.MATH):
            require_gpu(self.device)
        grouped = self.shape.heads != self.shape.kv_heads

        def step(cache: Caches) -> Tensor:
            q, scale = prescaled(self.scaling, cache.q, cache.k, causal=False)
            with nullcontext() if backend is None else sdpa_kernel(backend):
                return scaled_dot_product_attention(q, cache.k, cache.v, scale=scale, enable_gqa=grouped)

        return step

    def _flash_attn(self, name: str, table: str) -> Step:
        """Make a step of flash_attn_with_kvcache: q [B, 1, Hq, D]."""
        function = package(name).flash_attn_with_kvcache
        require_gpu(self.device)
        require_16_bits(DTYPES[self.dtype])

        def step(cache: Caches) -> Tensor:
            if cache.table is not None and tritonattn.SCALINGS[self.scaling].about.reads_norms:
                raise Unavailable(f"no recipe for {self.scaling} of keys in pages")
            q, scale = prescaled(self.scaling, cache.q, cache.k, causal=False)
            pages = {} if cache.table is None else {table: cache.table}
            out = function(
                q.transpose(1, 2),
                *cache.sequences_first,
                cache_seqlens=cache.lengths,
                softmax_scale=scale,
                causal=True,
                **pages,
            )
            return (out[0] if isinstance(out, tuple) else out).transpose(1, 2)

        return step


def _contiguous(shape: Shape, dtype: torch.dtype, device: torch.device, seed: int) -> Caches:
    random = torch.Generator(device).manual_seed(seed)

    def normal(heads: int, rows: int) -> Tensor:
        size = (shape.batch, heads, rows, shape.head_dim)
        return torch.randn(size, generator=random, device=device, dtype=torch.float32).to(dtype)

    lengths = torch.full((shape.batch,), shape.k_len, dtype=torch.int32, device=device)
    keys, values = (normal(shape.kv_heads, shape.k_len) for _ in range(2))
    return Caches(normal(shape.heads, 1), keys, values, lengths, None)


def _in_pages(cache: Caches) -> Caches:
    """Move the keys into shuffled pages."""
    batch, _, length, _ = cache.k.shape
    page = min(_PAGE, length)
    each = length // page
    order = torch.randperm(batch * each, generator=torch.Generator().manual_seed(0)).to(cache.k.device)

    def paged(x: Tensor) -> Tensor:
        """Cut x [B, Hkv, S, D] into pages [N, page, Hkv, D], page n at order[n]."""
        pages = x.unflatten(2, (each, page)).permute(0, 2, 3, 1, 4).flatten(0, 1)
        return torch.empty_like(pages, memory_format=torch.contiguous_format).index_copy_(0, order, pages)

    return Caches(cache.q, paged(cache.k), paged(cache.v), cache.lengths, order.view(batch, each).int())
