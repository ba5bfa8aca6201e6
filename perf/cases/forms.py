"""Forms of attention on a CPU, each as one call of ours and as its peers: the best that PyTorch does by hand."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import accumulate, pairwise
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention as sdpa

import tritonattn

from .recipes import Visible, rows_by_hand

WINDOW = 128
Attend = Callable[..., Tensor]


@dataclass(frozen=True)
class Size:
    batch: int
    heads: int
    length: int
    head_dim: int
    dtype: torch.dtype
    scaling: str


@dataclass(frozen=True)
class Form:
    """A form at a size.

    leaves      what the calls take, and where there is a backward what has a gradient: q, k, v, perhaps a bias
    ours        the call
    peers       by name, each the same function of the leaves
    arguments   of `tritonattn.attention`, for the same result by the reference; tensors with axes of entries and heads
    extra       the name of the argument that a fourth leaf is
    aux         ours returns statistics too, which no peer does
    random      results follow a generator of each contestant
    backward    there is one
    """

    name: str
    leaves: tuple[Tensor, ...]
    ours: Attend
    peers: dict[str, Attend]
    arguments: dict[str, Any] = field(default_factory=dict)
    extra: str = ""
    aux: bool = False
    random: bool = False
    backward: bool = True


def scaled(scaling: str, q: Tensor, k: Tensor, visible: Visible) -> tuple[Tensor, float]:
    """q times the factor by hand, and the scale that is left."""
    if scaling == "sqrt_dim":
        return q, q.shape[-1] ** -0.5
    rows = rows_by_hand(scaling, k, visible)
    if rows.dim() > 2 and rows.shape[1] not in (1, q.shape[1]):
        rows = rows.repeat_interleave(q.shape[1] // rows.shape[1], 1)
    return (q * rows[..., None]).to(q.dtype), 1.0


def forms(size: Size) -> Iterator[Form]:
    """Every form at a size."""
    yield from _of_ranges(size)
    yield from _packed(size)
    yield from _of_lengths(size)
    yield from _with_terms(size)
    yield from _of_pairs(size)
    yield _swin(size)
    yield from _decoding(size)


def _normal(size: Size, *shape: int) -> Tensor:
    random = torch.Generator().manual_seed(sum(shape))
    return torch.randn(shape, generator=random).to(size.dtype)


def _operands(size: Size) -> tuple[Tensor, Tensor, Tensor]:
    whole = _normal(size, 3, size.batch, size.heads, size.length, size.head_dim)
    q, k, v = (x.contiguous() for x in whole)
    return q, k, v


def _ours(size: Size, **arguments: Any) -> Attend:
    return lambda q, k, v: tritonattn.attention(q, k, v, scaling=size.scaling, backend="sdpa", **arguments)


def _lower(size: Size) -> Tensor:
    return torch.ones(size.length, size.length, dtype=torch.bool).tril()


def _plain(size: Size, visible: Visible, **arguments: Any) -> Attend:
    """SDPA with q multiplied before."""

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, scale = scaled(size.scaling, q, k, visible)
        return sdpa(q, k, v, scale=scale, **arguments)

    return attend


def _eager(size: Size, visible: Visible, drop: float = 0.0, softcap: float = 0.0) -> Attend:
    def attend(q: Tensor, k: Tensor, v: Tensor, *biases: Tensor) -> Tensor:
        q, scale = scaled(size.scaling, q, k, visible)
        if biases:  # in 16 bits rounded once, with its bias: a sum of rounded logits is over the error bound
            bias = biases[0].expand(*q.shape[:3], k.shape[2]).flatten(0, 1)
            logits = torch.baddbmm(bias, q.flatten(0, 1), k.flatten(0, 1).mT, alpha=scale).unflatten(0, q.shape[:2])
        else:
            logits = (q @ k.mT) * scale
        if softcap:
            logits = softcap * torch.tanh(logits / softcap)
        if visible.mask is not None:
            logits = logits.masked_fill(~visible.mask, -math.inf)
        weights = logits.softmax(-1)
        return (torch.dropout(weights, drop, True) if drop else weights) @ v

    return attend


def _of_ranges(size: Size) -> Iterator[Form]:
    leaves, length = _operands(size), size.length
    row = torch.arange(length)
    causal = Visible(torch.zeros_like(row), row + 1, _lower(size))
    plain = {"sdpa": _plain(size, causal, is_causal=True)}
    yield Form("causal", leaves, _ours(size, causal=True), plain, {"causal": True})
    hiding = {"causal": True, "window": (length, 0), "key_lengths": torch.full((size.batch,), length)}
    yield Form("causal; a window and lengths hide nothing", leaves, _ours(size, **hiding), plain, {"causal": True})

    band = Visible((row - WINDOW + 1).clamp(min=0), row + 1, _lower(size) & ~_lower(size).tril(-WINDOW))
    window = {"causal": True, "window": (WINDOW - 1, 0)}
    peers = {"mask": _plain(size, band, attn_mask=band.mask)}
    peers |= {f"chunks of {chunk}": _chunks(size, band, chunk) for chunk in (128, 256)}
    yield Form(f"window of {WINDOW}", leaves, _ours(size, **window), peers, window)

    rows = max(1, length // 4)
    last = Visible(causal.lo[-rows:], causal.hi[-rows:], causal.mask[-rows:])
    of_last = leaves[0][:, :, -rows:].contiguous(), *leaves[1:]
    masked = {"mask": _plain(size, last, attn_mask=last.mask)}
    yield Form("causal, the last quarter of the rows", of_last, _ours(size, causal=True), masked, {"causal": True})

    capped = {"causal": True, "softcap": 30.0}
    peers = {"eager": _eager(size, causal, softcap=30.0)}
    yield Form("causal, softcap", leaves, _ours(size, **capped), peers, capped)
    wide = *leaves[:2], _normal(size, size.batch, size.heads, length, 2 * size.head_dim)
    peers = {"mask": _plain(size, band, attn_mask=band.mask)}
    yield Form("window, Dv = 2 D", wide, _ours(size, **window), peers, window)
    whole = Visible(torch.zeros_like(row), torch.full_like(row, length), None)
    for name, visible, arguments in (("causal", causal, {"causal": True}), ("full", whole, {})):
        dropping = {**arguments, "dropout_p": 0.1}
        peers = {"eager": _eager(size, visible, drop=0.1)}
        yield Form(f"{name}, dropout", leaves, _ours(size, **dropping), peers, dropping, random=True)
        ours = _ours(size, return_aux=True, **arguments)
        peer = {"sdpa alone": _plain(size, visible, is_causal=name == "causal")}
        yield Form(f"{name}, return_aux", leaves, ours, peer, arguments, aux=True)


def _chunks(size: Size, band: Visible, chunk: int) -> Attend:
    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, scale = scaled(size.scaling, q, k, band)
        outs = []
        for first in range(0, size.length, chunk):
            rows, keys = slice(first, first + chunk), slice(max(0, first - WINDOW + 1), first + chunk)
            outs.append(sdpa(q[:, :, rows], k[:, :, keys], v[:, :, keys], band.mask[rows, keys], scale=scale))
        return torch.cat(outs, 2)

    return attend


def _packed(size: Size) -> Iterator[Form]:
    """Documents of one row of tokens; a batch is as many times the documents."""
    length = size.length
    mixed = (length // 2, *[length // 8] * 3, *[length // 16] * 2)
    for name, lengths in {
        "one document": [length],
        "6 documents of three lengths": mixed,
        "8 documents": [length // 8] * 8,
        "32 documents": [length // 32] * 32,
    }.items():
        lengths = [max(1, one) for one in lengths]
        starts = [0, *accumulate(lengths * size.batch)]
        ends = torch.tensor(starts, dtype=torch.int32)
        document = torch.bucketize(torch.arange(starts[-1]), ends[1:].long(), right=True)
        first = ends.long()[document]
        row = torch.arange(starts[-1])
        visible = Visible(first, row + 1, None)
        operands = _normal(size, 3, starts[-1], size.heads, size.head_dim)
        leaves = tuple(x.contiguous().transpose(0, 1)[None] for x in operands)
        limits = ends, ends, max(lengths), max(lengths)

        def ours(q: Tensor, k: Tensor, v: Tensor, limits: tuple = limits) -> Tensor:
            rows = (x[0].transpose(0, 1) for x in (q, k, v))
            out = tritonattn.attention_varlen(*rows, *limits, causal=True, scaling=size.scaling, backend="sdpa")
            return out.transpose(0, 1)[None]

        def by_document(q: Tensor, k: Tensor, v: Tensor, starts: list = starts, visible: Visible = visible) -> Tensor:
            q, scale = scaled(size.scaling, q, k, visible)
            parts = [slice(*ends) for ends in pairwise(starts)]
            outs = [sdpa(q[:, :, one], k[:, :, one], v[:, :, one], is_causal=True, scale=scale) for one in parts]
            return torch.cat(outs, 2)

        ranges = {"key_ranges": torch.stack([first, row + 1], -1)[None].int()}
        yield Form(f"packed: {name}", leaves, ours, {"documents": by_document}, ranges)


def _of_lengths(size: Size) -> Iterator[Form]:
    """Four padded sequences of a quarter of the tokens."""
    length, batch = max(1, size.length // 4), 4 * size.batch
    leaves = _operands(Size(batch, size.heads, length, size.head_dim, size.dtype, size.scaling))
    lengths = [length, max(1, length * 3 // 4), max(1, length // 2), max(1, length // 3)] * size.batch
    ends, row = torch.tensor(lengths), torch.arange(length)
    padding = (row < ends[:, None])[:, None, None]
    whole = Visible(torch.zeros(batch, 1, length).long(), ends[:, None, None].expand(-1, 1, length), padding)
    triangle = Visible(whole.lo, torch.minimum(whole.hi, row + 1), padding & torch.ones(length, length).tril().bool())

    def slices(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, scale = scaled(size.scaling, q, k, whole)
        outs = [
            sdpa(q[n : n + 1], k[n : n + 1, :, :end], v[n : n + 1, :, :end], scale=scale)
            for n, end in enumerate(lengths)
        ]
        return torch.cat(outs)

    peers = {"mask": _plain(size, whole, attn_mask=padding), "slices": slices}
    yield Form("key_lengths", leaves, _ours(size, key_lengths=ends), peers, {"key_lengths": ends})
    arguments = {"causal": True, "key_lengths": ends}
    peers = {"mask": _plain(size, triangle, attn_mask=triangle.mask)}
    yield Form("key_lengths, causal", leaves, _ours(size, **arguments), peers, arguments)


def _with_terms(size: Size) -> Iterator[Form]:
    """Sinks, biases of keys, a mask with holes."""
    leaves, (batch, heads, length) = _operands(size), (size.batch, size.heads, size.length)
    row, lower = torch.arange(length), _lower(size)
    causal = Visible(torch.zeros_like(row), row + 1, lower)
    whole = Visible(torch.zeros_like(row), torch.full_like(row, length), None)
    sinks = torch.randn(heads, generator=torch.Generator().manual_seed(1))

    def with_zeros(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Add a key of zeros, whose bias is the sink."""
        q, scale = scaled(size.scaling, q, k, causal)
        k, v = (torch.cat([x, x.new_zeros(batch, heads, 1, size.head_dim)], 2) for x in (k, v))
        visible = torch.where(lower, 0.0, -math.inf).expand(heads, -1, -1)
        mask = torch.cat([visible, sinks[:, None, None].expand(-1, length, 1)], -1).to(q.dtype)
        return sdpa(q, k, v, mask[None], scale=scale)

    arguments = {"causal": True, "sinks": sinks}
    yield Form("causal, sinks", leaves, _ours(size, **arguments), {"key of zeros": with_zeros}, arguments)
    bias = torch.randn(batch, heads, length, generator=torch.Generator().manual_seed(2))
    for name, visible, options in (("key_bias", whole, {}), ("causal, key_bias", causal, {"causal": True})):

        def masked(q: Tensor, k: Tensor, v: Tensor, visible: Visible = visible) -> Tensor:
            q, scale = scaled(size.scaling, q, k, visible)
            mask = bias[:, :, None].expand(-1, -1, length, -1)
            mask = mask if visible.mask is None else torch.where(visible.mask, mask, -math.inf)
            return sdpa(q, k, v, mask.to(q.dtype), scale=scale)

        arguments = {"key_bias": bias, **options}
        yield Form(name, leaves, _ours(size, **arguments), {"mask": masked}, arguments)
    holes = torch.rand(length, length, generator=torch.Generator().manual_seed(3)) > 0.3
    peers = {"mask": _plain(size, Visible(None, None, holes), attn_mask=holes)}
    yield Form("mask with holes", leaves, _ours(size, mask=holes), peers, {"mask": holes})


def _of_pairs(size: Size) -> Iterator[Form]:
    """Biases of pairs, with and without their gradient."""
    leaves, (batch, heads, length) = _operands(size), (size.batch, size.heads, size.length)
    row = torch.arange(length)
    whole = Visible(torch.zeros_like(row), torch.full_like(row, length), None)
    bias = _normal(size, batch, heads, length, length)

    def masked(q: Tensor, k: Tensor, v: Tensor, bias: Tensor = bias) -> Tensor:
        q, scale = scaled(size.scaling, q, k, whole)
        return sdpa(q, k, v, bias, scale=scale)

    def with_bias(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
        return tritonattn.attention(q, k, v, scaling=size.scaling, bias=bias, backend="sdpa")

    yield Form("bias of pairs", leaves, _ours(size, bias=bias), {"mask": masked}, {"bias": bias})
    peers = {"mask": masked, "eager": _eager(size, whole)}
    yield Form("bias of pairs and its gradient", (*leaves, bias), with_bias, peers, extra="bias")
    table, at = _normal(size, 1, heads, 1, 2 * length - 1), row[:, None] - row + length - 1

    def with_table(q: Tensor, k: Tensor, v: Tensor, table: Tensor) -> Tensor:
        options = {"relative_bias": table, "relative_right": length - 1, "scaling": size.scaling}
        return tritonattn.attention(q, k, v, backend="sdpa", **options)

    def gathered(attend: Attend) -> Attend:
        return lambda q, k, v, table: attend(q, k, v, table[:, :, 0][:, :, at].expand(batch, -1, -1, -1))

    peers = {"mask": gathered(masked), "eager": gathered(_eager(size, whole))}
    arguments = {"relative_right": length - 1}
    yield Form("relative_bias and its gradient", (*leaves, table), with_table, peers, arguments, extra="relative_bias")


def _swin(size: Size) -> Form:
    """Windows of 49 tokens with a learned bias of pairs, as in Swin: [64, 4, 49, 32] at 1,024 tokens of 8 heads."""
    tokens, heads = 49, max(1, size.heads // 2)
    small = Size(size.batch * max(1, size.length // 16), heads, tokens, size.head_dim // 2, size.dtype, size.scaling)
    row = torch.arange(tokens)
    whole = Visible(torch.zeros_like(row), torch.full_like(row, tokens), None)
    bias = _normal(small, 1, heads, tokens, tokens)

    def masked(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
        q, scale = scaled(size.scaling, q, k, whole)
        return sdpa(q, k, v, bias, scale=scale)

    def ours(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
        return tritonattn.attention(q, k, v, scaling=size.scaling, bias=bias, backend="sdpa")

    peers = {"mask": masked, "eager": _eager(small, whole)}
    return Form(
        "windows of 49 tokens (Swin), bias and its gradient", (*_operands(small), bias), ours, peers, extra="bias"
    )


def _decoding(size: Size) -> Iterator[Form]:
    """A row over a cache of `length` keys, of which half may be unwritten; groups of 4 query heads."""
    length, dim = size.length, size.head_dim
    for name, batch, heads, kv_heads, written in (
        ("decode", size.batch, 8, 8, length),
        ("decode, half of the cache", size.batch, 8, 8, max(1, length // 2)),
        ("decode, 32 / 8 heads", size.batch, 32, 8, length),
        ("decode, 8 sequences", 8 * size.batch, 8, 8, length),
    ):
        q = _normal(size, batch, heads, 1, dim)
        k, v = (x.contiguous() for x in _normal(size, 2, batch, kv_heads, length, dim))
        lengths, group = torch.full((batch,), written, dtype=torch.int32), heads // kv_heads
        visible = Visible(torch.zeros(1).long(), torch.full((1,), written), None)

        def ours(q: Tensor, k: Tensor, v: Tensor, lengths: Tensor = lengths) -> Tensor:
            return tritonattn.attention_decode(q, k, v, key_lengths=lengths, scaling=size.scaling, backend="sdpa")

        def by_sdpa(q: Tensor, k: Tensor, v: Tensor, end: int = written, visible: Visible = visible) -> Tensor:
            k, v = k[:, :, :end], v[:, :, :end]
            q, scale = scaled(size.scaling, q, k, visible)
            return sdpa(q, k, v, scale=scale, enable_gqa=q.shape[1] != k.shape[1])

        def eager(
            q: Tensor, k: Tensor, v: Tensor, end: int = written, visible: Visible = visible, group: int = group
        ) -> Tensor:
            k, v = k[:, :, :end], v[:, :, :end]
            q, scale = scaled(size.scaling, q, k, visible)
            rows = q.unflatten(1, (-1, group)).flatten(2, 3)
            return (((rows @ k.mT) * scale).softmax(-1) @ v).reshape(q.shape)

        peers = {"slices": by_sdpa, "eager": eager}
        yield Form(name, (q, k, v), ours, peers, {"key_lengths": lengths}, backward=False)
