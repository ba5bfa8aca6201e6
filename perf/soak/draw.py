"""Random calls of the public functions, each drawn from a seed."""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor

import tritonattn
from tritonattn.calls.decode import cache_operands, cache_visibility
from tritonattn.core.call import Request
from tritonattn.core.terms import Terms

from .trial import Tensors, Trial

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
# Seeds below this one test head_dim 32 with software pipelines of several stages: triton issue 10573 reports illegal
# accesses of such a backward pass on sm_90.
HAZARD_SEEDS = 128
HAZARD_STAGES = (2, 3, 4)
_INVARIANT = 0.3  # chance that batch_invariant is drawn


@dataclass(frozen=True)
class Limits:
    """The largest size of a trial, and how many seeds in a row share the choices that select code.

    An interpreter takes short sequences and narrow heads, and compiles nothing.
    """

    length: int
    head_dims: tuple[int, ...]
    variations: int


ON_A_GPU = Limits(1100, (5, 8, 16, 17, 32, 40, 64, 72, 80, 96, 104, 128, 136, 192, 256), variations=8)
INTERPRETED = Limits(40, (5, 8, 16, 17, 32), variations=1)


@dataclass(frozen=True)
class Draw:
    """Random choices and tensors of one seed.

    code      draws the choices that select code: dtype, widths, memory layouts, which arguments are given
    size      draws lengths, numbers of heads and values
    numbers   fills tensors
    """

    seed: int
    device: torch.device
    limits: Limits
    code: random.Random = field(init=False)
    size: random.Random = field(init=False)
    numbers: torch.Generator = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "code", random.Random(self.seed // self.limits.variations))
        object.__setattr__(self, "size", random.Random(self.seed))
        object.__setattr__(self, "numbers", torch.Generator().manual_seed(self.seed))

    def one_of(self, *values: Any) -> Any:
        return self.code.choice(values)

    def happens(self, chance: float) -> bool:
        return self.code.random() < chance

    def between(self, low: int, high: int) -> int:
        """Draw a number, each order of magnitude alike, since edge cases are in short sequences."""
        return min(high, max(low, round(low * (high / low) ** self.size.random())))

    def lengths(self) -> tuple[int, int]:
        """Draw the numbers of rows and keys, which are often equal."""
        length = self.between(1, self.limits.length)
        return length, length if self.size.random() < 0.4 else self.between(1, self.limits.length)

    def normal(self, *shape: int) -> Tensor:
        """Draw fp32 on the device."""
        return torch.randn(shape, generator=self.numbers).to(self.device)

    def counts(self, batch: int, most: int) -> Tensor:
        """Draw integers [B] in [0, most]."""
        return torch.randint(0, most + 1, (batch,), generator=self.numbers).to(self.device)

    def operand(self, dtype: torch.dtype, *shape: int) -> Tensor:
        """Draw a tensor, contiguous or inside of NaN: padded rows, transposed heads and rows, off alignment."""
        rows, (before, after) = self.one_of(0, 1), self.one_of((0, 0), (0, 0), (8, 8), (1, 2))
        heads_inside = self.happens(0.3)
        outer = [*shape[:-3], *((shape[-2], shape[-3]) if heads_inside else shape[-3:-1])]
        padded = torch.full([*outer[:-1], outer[-1] + 2 * rows, shape[-1] + before + after], torch.nan, dtype=dtype)
        view = padded.to(self.device)[..., rows : rows + outer[-1], before : before + shape[-1]]
        view = view.transpose(-3, -2) if heads_inside else view
        return view.copy_(self.normal(*shape))


def trials(first: int, device: torch.device, limits: Limits) -> Iterator[Trial]:
    """Draw the trials of the seeds from `first` on."""
    return (draw(seed, device, limits) for seed in itertools.count(first))


def draw(seed: int, device: torch.device, limits: Limits) -> Trial:
    """Draw the trial of a seed; it is the same for the same limits."""
    source = Draw(seed, device, limits)
    if seed < HAZARD_SEEDS:
        return _dense(source, head_dim=32, stages=source.one_of(*HAZARD_STAGES))
    head_dim = source.one_of(*limits.head_dims)
    return source.one_of(_dense, _dense, _varlen, _decode)(source, head_dim)


def _dense(source: Draw, head_dim: int, stages: int | None = None) -> Trial:
    dtype, (batch, kv_heads, group) = source.one_of(*DTYPES), _heads(source)
    q_len, k_len = source.lengths()
    value_dim = _value_dim(source, head_dim)
    leaves = {
        "q": source.operand(dtype, batch, kv_heads * group, q_len, head_dim),
        "k": source.operand(dtype, batch, kv_heads, k_len, head_dim),
        "v": source.operand(dtype, batch, kv_heads, k_len, value_dim),
    }
    options = _masks(source, batch, q_len, k_len) | _forms(source, kv_heads * group, leaves)
    if source.happens(0.3):
        options["dropout_p"] = source.one_of(0.1, 0.5)
    if "key_lengths" in options:
        for b, length in enumerate(options["key_lengths"].tolist()):
            leaves["k"][b, :, length:] = leaves["v"][b, :, length:] = torch.nan
    name, attend = "scaled_attention", tritonattn.scaled_attention
    if source.happens(0.5):
        leaves |= _scales(source, batch, kv_heads, group, q_len, k_len)
    else:
        mode = _mode(source, leaves, kv_heads * group)
        name, attend = f"attention({mode})", partial(tritonattn.attention, scaling=mode)
    invariant = _invariant(source, dtype, options)
    return Trial(source.seed, name, dtype, leaves, options, attend, stages=stages, invariant=invariant)


def _varlen(source: Draw, head_dim: int) -> Trial:
    dtype, (_, kv_heads, group) = source.one_of(*DTYPES), _heads(source)
    sequences = source.between(1, 6)
    lengths = [[0 if source.size.random() < 0.2 else n for n in source.lengths()] for _ in range(sequences)]
    ends = [torch.tensor([0, *column]).cumsum(0).int().to(source.device) for column in zip(*lengths, strict=True)]
    totals = [int(end[-1]) + source.size.choice((0, 3, 40)) + 1 for end in ends]
    leaves = {
        "q": source.operand(dtype, totals[0], kv_heads * group, head_dim),
        "k": source.operand(dtype, totals[1], kv_heads, head_dim),
        "v": source.operand(dtype, totals[1], kv_heads, _value_dim(source, head_dim)),
    }
    for name in ("k", "v"):
        leaves[name][int(ends[1][-1]) :] = torch.nan
    options = {"cu_seqlens_q": ends[0], "cu_seqlens_k": ends[1], "causal": source.happens(0.5)}
    options |= {
        f"max_seqlen_{name}": max(column) + source.size.choice((0, 5))
        for name, column in zip("qk", zip(*lengths, strict=True), strict=True)
    }
    if source.happens(0.3):
        options["window"] = (source.between(1, source.limits.length), source.one_of(None, 0, 7))
    if source.happens(0.3):
        options["dropout_p"] = source.one_of(0.1, 0.5)
    options |= _forms(source, kv_heads * group, leaves)
    mode = _mode(source, leaves, kv_heads * group)
    attend = partial(tritonattn.attention_varlen, scaling=mode)
    invariant = _invariant(source, dtype, options)
    return Trial(source.seed, f"attention_varlen({mode})", dtype, leaves, options, attend, invariant=invariant)


def _decode(source: Draw, head_dim: int) -> Trial:
    dtype, (batch, kv_heads, group) = source.one_of(*DTYPES), _heads(source)
    q_len, capacity, page = source.one_of(1, 1, 2, 5, 16), source.lengths()[1], source.one_of(None, 16, 24)
    if page is not None:
        each = -(-capacity // page)
        capacity = each * page
    slots = (batch, kv_heads, capacity) if page is None else (batch * each + 2, kv_heads, page)
    value_dim = _value_dim(source, head_dim)
    leaves = {
        "q": source.operand(dtype, batch, kv_heads * group, q_len, head_dim),
        "k_cache": source.operand(dtype, *slots, head_dim),
        "v_cache": source.operand(dtype, *slots, value_dim),
    }
    options: dict[str, Any] = {"key_lengths": source.counts(batch, capacity)}
    if page is None:
        for b, length in enumerate(options["key_lengths"].tolist()):
            leaves["k_cache"][b, :, length:] = leaves["v_cache"][b, :, length:] = torch.nan
    else:
        order = torch.randperm(batch * each + 2, generator=source.numbers)[: batch * each]
        options["block_table"] = order.view(batch, each).int().to(source.device)
        leaves |= {name: leaves[name].transpose(1, 2) for name in ("k_cache", "v_cache")}
    if source.happens(0.3):
        options["window"] = (source.between(1, capacity), 0)
    options |= _forms(source, kv_heads * group, leaves)
    mode, name, attend = source.one_of(*tritonattn.SCALINGS), "attention_decode", tritonattn.attention_decode
    if source.happens(0.5):
        name, attend = "attention_decode with statistics", _decode_with_statistics
    attend = partial(attend, scaling=mode)
    invariant = source.happens(_INVARIANT)
    return Trial(source.seed, f"{name}({mode})", dtype, leaves, options, attend, gradients=False, invariant=invariant)


def _decode_with_statistics(q: Tensor, k_cache: Tensor, v_cache: Tensor, **options: Any) -> Any:
    """Call `attention_decode` with a record of the keys in the cache."""
    lengths, table = options["key_lengths"], options.get("block_table")
    q, k, v = cache_operands(q, k_cache, v_cache, table)
    keys = Request(q, k, v, cache_visibility(q, k, lengths, table), Terms(), block_table=table).keys()
    dtype = torch.promote_types(q.dtype, torch.float32)
    record = tritonattn.KeyStatistics(*keys.shape[:3], device=q.device, dtype=dtype)
    record.append(keys, lengths)
    return tritonattn.attention_decode(q, k_cache, v_cache, **options, statistics=record)


def _heads(source: Draw) -> tuple[int, int, int]:
    """Draw the batch, the key heads, and the query heads of each."""
    return source.size.choice((1, 2, 3)), source.size.choice((1, 1, 2)), source.one_of(1, 1, 2, 5)


def _value_dim(source: Draw, head_dim: int) -> int:
    return head_dim if source.happens(0.8) else source.one_of(*source.limits.head_dims)


def _mode(source: Draw, leaves: Tensors, q_heads: int) -> str:
    """Draw a name in SCALINGS, sometimes with a gain."""
    if source.happens(0.3):
        leaves["gain"] = source.normal(q_heads, 1)
    return source.one_of(*tritonattn.SCALINGS)


def _scales(source: Draw, batch: int, kv_heads: int, group: int, q_len: int, k_len: int) -> Tensors:
    """Draw scales of either sign, some of them 0, or none."""
    scales = {}
    if source.happens(0.8):
        scales["query_scale"] = source.normal(batch, kv_heads * group, q_len)
        scales["query_scale"][..., ::7] = 0
    if source.happens(0.5):
        scales["key_scale"] = source.normal(batch, kv_heads, k_len)
        scales["key_scale"][..., ::5] = 0
    return scales


def _masks(source: Draw, batch: int, q_len: int, k_len: int) -> dict[str, Any]:
    """Draw some of causal, window, key_lengths, key_ranges, and a dense mask."""
    masks: dict[str, Any] = {"causal": source.happens(0.5)}
    if source.happens(0.3):
        masks["window"] = (source.between(1, k_len), source.one_of(None, 0, 5))
    if source.happens(0.2):
        masks["key_lengths"] = source.counts(batch, k_len)
    if source.happens(0.2):
        bounds = torch.randint(0, k_len + 1, (batch, q_len, 2), generator=source.numbers, dtype=torch.int32)
        if source.device.type == "cpu":  # where reversed ones are refused
            bounds[..., 0] = bounds.amin(-1)
        masks["key_ranges"] = bounds.to(source.device)
    if source.happens(0.15):
        masks["mask"] = (torch.rand(batch, 1, q_len, k_len, generator=source.numbers) > 0.4).to(source.device)
    return masks


def _invariant(source: Draw, dtype: torch.dtype, options: dict[str, Any]) -> bool:
    """Draw batch_invariant, never where some scaling refuses it: with gradients of fp16, dropout or a dense mask."""
    drawn = source.happens(_INVARIANT)
    return drawn and dtype != torch.float16 and not options.keys() & {"dropout_p", "mask"}


def _forms(source: Draw, q_heads: int, leaves: Tensors) -> dict[str, Any]:
    """Draw some of softcap, sinks (a leaf) and the auxiliary results."""
    forms: dict[str, Any] = {}
    if source.happens(0.25):
        forms["softcap"] = source.one_of(0.7, 5.0, 30.0)
    if source.happens(0.25):
        q = leaves["q"]
        of_rows = (len(q), q_heads, q.shape[2]) if q.dim() == 4 else (q_heads, len(q))
        leaves["sinks"] = source.normal(*source.one_of((q_heads,), of_rows))
    if source.happens(0.3):
        forms["return_aux"] = True
    return forms
