"""One sequence computed alone, and again with the rest of a batch: every result must have the same bits."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

import tritonattn
from tests.support.caches import GrowingCache

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
LEARNED = {**tritonattn.nn.LEARNED, "query_adaptive_ssmax": tritonattn.nn.QueryAdaptiveSSMax}
NAMES = ("out", "lse", "max_logit", "entropy", "d_q", "d_k", "d_v")
ROWS = 5  # the first names: results of rows


@dataclass(frozen=True)
class Case:
    """A sequence of `length` tokens in one of BATCHES. reach: "full", "causal" or a causal window's left side."""

    batch: str
    dtype: str
    dims: tuple[int, int]
    scaling: str
    reach: str | int
    heads: tuple[int, int]  # key heads, and query heads of each
    softcap: float | None
    sinks: bool
    length: int
    seed: int

    @property
    def has_gradients(self) -> bool:
        """True where gradients are compared: those of fp16 with scales are refused in kernels."""
        return self.batch not in ("decode", "paged") and (self.dtype != "fp16" or self.scaling == "sqrt_dim")


@dataclass(frozen=True)
class Sequence:
    """q, d_out [Hq, n, D or Dv]; k, v [Hkv, n, D or Dv]; d_lse [Hq, n]."""

    q: Tensor
    k: Tensor
    v: Tensor
    d_out: Tensor
    d_lse: Tensor

    @property
    def length(self) -> int:
        return self.q.shape[1]

    @classmethod
    def random(cls, case: Case, length: int) -> Sequence:
        (kv_heads, group), (dim, value_dim), dtype = case.heads, case.dims, DTYPES[case.dtype]
        q_heads = kv_heads * group
        shapes = ((q_heads, dim), (kv_heads, dim), (kv_heads, value_dim), (q_heads, value_dim))
        q, k, v, d_out = (torch.randn(heads, length, width).to(dtype) for heads, width in shapes)
        return cls(q, k, v, d_out, torch.randn(q_heads, length))


class Attend:
    """The calls of a case with its options; parameters of a learned scaling are drawn, not at their start."""

    def __init__(self, case: Case, backend: str, invariant: bool) -> None:
        self.case = case
        q_heads = case.heads[0] * case.heads[1]
        self.scaling: Any = case.scaling
        if case.scaling in LEARNED:
            needs = {"head_dim": case.dims[0]} if case.scaling == "query_adaptive_ssmax" else {}
            self.scaling = LEARNED[case.scaling](heads=q_heads, **needs)
            with torch.no_grad():
                for parameter in self.scaling.parameters():
                    parameter += torch.rand_like(parameter)
        self.window = (case.reach, None) if isinstance(case.reach, int) else None
        self.options = {
            "scaling": self.scaling,
            "softcap": case.softcap,
            "sinks": torch.randn(q_heads) if case.sinks else None,
            "backend": backend,
            "batch_invariant": invariant,
            "return_aux": True,
            "window": self.window,
        }

    def _run(self, function, inputs: tuple[Tensor, ...], grads: tuple[Tensor, Tensor], *more, **masks) -> list[Tensor]:
        gradients = self.case.has_gradients
        inputs = tuple(x.detach().clone().requires_grad_(gradients) for x in inputs)
        out, aux = function(*inputs, *more, **self.options, **masks)
        found = [out, *aux]
        if gradients:
            lse = aux.lse.masked_fill(aux.lse.isinf(), 0)
            found += torch.autograd.grad((out * grads[0]).sum() + (lse * grads[1]).sum(), inputs)
        return [x.detach() for x in found]

    def batched(self, q, k, v, d_out, d_lse, **masks) -> list[Tensor]:
        causal = self.case.reach != "full"
        return self._run(tritonattn.attention, (q, k, v), (d_out, d_lse), causal=causal, **masks)

    def alone(self, one: Sequence) -> list[Tensor]:
        found = self.batched(*(x[None] for x in (one.q, one.k, one.v, one.d_out, one.d_lse)))
        return [x[0] for x in found]

    def packed(self, sequences: list[Sequence]) -> list[Tensor]:
        """Results as [H, T, ...]."""
        lengths = [0, *(one.q.shape[1] for one in sequences)]
        ends = torch.tensor(lengths).cumsum(0).int()
        q, k, v, d_out = (
            torch.cat([getattr(one, name).transpose(0, 1) for one in sequences]) for name in ("q", "k", "v", "d_out")
        )
        d_lse = torch.cat([one.d_lse for one in sequences], dim=1)
        sequences_of = (ends, ends, max(lengths), max(lengths))
        causal = self.case.reach != "full"
        found = self._run(tritonattn.attention_varlen, (q, k, v), (d_out, d_lse), *sequences_of, causal=causal)
        return [x if x.dim() == 2 else x.transpose(0, 1) for x in found]

    def decode(self, one: Sequence, others: list[Sequence], page: int | None, draw: random.Random) -> list[Tensor]:
        """The results of the last 1 to 16 rows."""
        new = draw.randint(1, min(16, one.q.shape[1]))
        sequences = [one, *others]
        lengths = [each.q.shape[1] for each in sequences]
        keys, values = (_padded([getattr(each, name) for each in sequences]) for name in "kv")
        cache = GrowingCache(keys, values, max(lengths) + draw.randint(0, 70), page, statistics=draw.random() < 0.6)
        left = list(lengths)
        while any(left):
            step = [min(count, draw.randint(1, 40)) for count in left]
            cache.write(step)
            left = [count - done for count, done in zip(left, step, strict=True)]
        q = cache.newest(_padded([each.q for each in sequences]), new)
        with torch.no_grad():
            out, aux = tritonattn.attention_decode(q, **cache.arguments(), **self.options)
        return [x[0] for x in (out, *aux)]


def differences(case: Case, backend: str, invariant: bool = True) -> list[str]:
    """The names of results that differ from those of the sequence alone."""
    torch.manual_seed(case.seed)
    draw = random.Random(case.seed)
    attend, one = Attend(case, backend, invariant), Sequence.random(case, case.length)
    alone = attend.alone(one)
    expected, found = BATCHES[case.batch](attend, one, alone, draw)
    pairs = zip(NAMES, expected, found, strict=False)
    return [name for name, x, y in pairs if not torch.equal(x, y)]


def _others(attend: Attend, draw: random.Random, longest: int) -> list[Sequence]:
    return [Sequence.random(attend.case, draw.randint(1, longest)) for _ in range(draw.randint(1, 3))]


def _batch(attend: Attend, one: Sequence, alone: list[Tensor], draw: random.Random):
    """Other entries of the same length."""
    position, size = draw.randrange(3), 3
    others = [Sequence.random(attend.case, one.length) for _ in range(size - 1)]
    sequences = [*others[:position], one, *others[position:]]
    tensors = [torch.stack([getattr(each, name) for each in sequences]) for name in ("q", "k", "v", "d_out", "d_lse")]
    return alone, [x[position] for x in attend.batched(*tensors)]


def _padded_batch(attend: Attend, one: Sequence, alone: list[Tensor], draw: random.Random):
    """Padding on the right: NaN in keys and values, rows without a gradient."""
    sequences = [one, *_others(attend, draw, 2 * one.length)]
    lengths = torch.tensor([each.length for each in sequences])
    fills = {"q": 1.0, "k": torch.nan, "v": torch.nan, "d_out": 0.0, "d_lse": 0.0}
    tensors = [_padded([getattr(each, name) for each in sequences], fill) for name, fill in fills.items()]
    found = attend.batched(*tensors, key_lengths=lengths)
    return alone, [x[0, :, : one.length] for x in found]


def _left_padded_batch(attend: Attend, one: Sequence, alone: list[Tensor], draw: random.Random):
    """Padding on the left, told by key_ranges: NaN in keys and values. All rows, or the last 1 to 16."""
    sequences = [one, *_others(attend, draw, 2 * one.length)]
    longest = max(each.length for each in sequences)
    rows = slice(longest - draw.choice([longest, one.length, draw.randint(1, 16)]), longest)
    fills = {"q": 1.0, "k": torch.nan, "v": torch.nan, "d_out": 0.0, "d_lse": 0.0}
    q, k, v, d_out, d_lse = (
        _padded([getattr(each, x) for each in sequences], fill, "left") for x, fill in fills.items()
    )
    first = torch.tensor([longest - each.length for each in sequences])[:, None]
    is_row = torch.arange(longest) >= first
    ranges = torch.stack([first.expand(is_row.shape), torch.where(is_row, longest, first)], dim=-1)
    q, d_out, d_lse = (x[:, :, rows] for x in (q, d_out, d_lse))
    found = attend.batched(q, k, v, d_out, d_lse, key_ranges=ranges[:, rows])
    count = min(rows.stop - rows.start, one.length)
    return [x[:, -count:] for x in alone[:ROWS]], [x[0, :, -count:] for x in found[:ROWS]]


def _packed_batch(attend: Attend, one: Sequence, alone: list[Tensor], draw: random.Random):
    others = _others(attend, draw, 2 * one.length)
    position = draw.randint(0, len(others))
    first = sum(each.length for each in others[:position])
    found = attend.packed([*others[:position], one, *others[position:]])
    return alone, [x[:, first : first + one.length] for x in found]


def _more_keys(attend: Attend, one: Sequence, alone: list[Tensor], draw: random.Random):
    """The sequence goes on, which causal rows do not attend to; others are told by key_ranges."""
    more = Sequence.random(attend.case, draw.randint(1, 150))
    q, d_out, d_lse = one.q, one.d_out, one.d_lse
    k, v = torch.cat([one.k, more.k], 1), torch.cat([one.v, more.v], 1)
    if attend.case.reach == "full":
        ranges = torch.tensor([0, one.length]).expand(1, one.length, 2)
        found = attend.batched(*(x[None] for x in (q, k, v, d_out, d_lse)), key_ranges=ranges)
    else:
        q, d_out, d_lse = (torch.cat([getattr(one, x), getattr(more, x)], 1) for x in ("q", "d_out", "d_lse"))
        found = attend.batched(*(x[None] for x in (q, k, v, d_out, d_lse)))
    return alone[:ROWS], [x[0, :, : one.length] for x in found[:ROWS]]


def _chunk(attend: Attend, one: Sequence, alone: list[Tensor], draw: random.Random):
    """Some rows at the end of the keys that they have so far; of a full sequence, some rows."""
    start, stop = sorted(draw.sample(range(one.length + 1), 2))
    seen = one.length if attend.case.reach == "full" else stop
    rows, keys = slice(start, stop), slice(0, seen)
    parts = (one.q[:, rows], one.k[:, keys], one.v[:, keys], one.d_out[:, rows], one.d_lse[:, rows])
    found = attend.batched(*(x[None] for x in parts))
    return [x[:, rows] for x in alone[:ROWS]], [x[0] for x in found[:ROWS]]


def _decoded(attend: Attend, one: Sequence, alone: list[Tensor], draw: random.Random, page: int | None = None):
    others = [Sequence.random(attend.case, draw.randint(16, 2 * one.length + 16)) for _ in range(2)]
    found = attend.decode(one, others, page, draw)
    return [x[:, -found[0].shape[1] :] for x in alone[:4]], found


def _paged(attend: Attend, one: Sequence, alone: list[Tensor], draw: random.Random):
    return _decoded(attend, one, alone, draw, page=draw.choice([16, 24, 64]))


BATCHES = {
    "batch": _batch,
    "padded": _padded_batch,
    "left padded": _left_padded_batch,
    "packed": _packed_batch,
    "more keys": _more_keys,
    "chunk": _chunk,
    "decode": _decoded,
    "paged": _paged,
}


def cases(count: int, seed: int, lengths: tuple[int, int], dims: tuple[tuple[int, int], ...]) -> Iterator[Case]:
    """Random cases; each batch, dtype and scaling in turn."""
    draw = random.Random(seed)
    scalings = [*tritonattn.SCALINGS, *LEARNED]
    for number in range(count):
        batch = list(BATCHES)[number % len(BATCHES)]
        decodes = batch in ("decode", "paged")
        reaches = ["causal"] if decodes else ["causal", "full"]
        yield Case(
            batch,
            draw.choice(list(DTYPES)),
            draw.choice(dims),
            scalings[number // 3 % len(scalings)],
            draw.choice([*reaches, draw.randint(1, lengths[1] if decodes else 90)]),
            (draw.randint(1, 2), draw.randint(1, 3)),
            draw.choice([None, None, 1.5]),
            draw.random() < 0.3,
            draw.randint(max(lengths[0], 16), lengths[1]),
            seed + number,
        )


def _padded(tensors: list[Tensor], fill: float = torch.nan, side: str = "right") -> Tensor:
    """[B, H, longest, ...] with `fill` behind each, or before it."""
    rows_first = [x.transpose(0, 1) for x in tensors]
    padded = pad_sequence(rows_first, batch_first=True, padding_value=fill, padding_side=side)
    return padded.transpose(1, 2).contiguous()
