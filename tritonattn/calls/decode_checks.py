"""Check the arguments of `attention_decode`, by the rules of checks.py."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..core.autograd import needs_graph
from ..core.decode_call import LONGEST_QUERY, Cache
from ..core.visibility import window_sides
from .checks import (
    FLOATS,
    Options,
    check_device,
    check_flags,
    check_integers,
    check_key_bias,
    check_sinks,
    check_tensor,
    check_values,
    check_window,
    kind_of,
    shape_of,
    values_are_read,
)
from .key_statistics import KeyStatistics

SMALLEST_PAGE = 16


def check_decode(q: Tensor, cache: Cache, statistics: KeyStatistics | None, options: Options) -> None:
    """Raise TypeError or ValueError unless these describe one decode call."""
    paged = cache.block_table is not None
    axes = "[N, page, Hkv, {}]" if paged else "[B, Hkv, capacity, {}]"
    _check_operand("q", q, "[B, Hq, Sq, D]")
    _check_operand("k_cache", cache.k, axes.format("D"))
    _check_operand("v_cache", cache.v, axes.format("Dv"))
    _check_alike(q, cache)
    if paged:
        _check_block_table(cache.block_table, q)
    _check_sizes(q, cache)
    check_flags(options)
    if options.window is not None:
        check_window(options.window)
    if options.sinks is not None:
        check_sinks(options.sinks, q)
    if options.key_bias is not None:
        keys = (cache.batch, cache.kv_heads, cache.capacity)
        check_key_bias("key_bias", options.key_bias, q, keys, "[B, Hq or Hkv, capacity]")
    _check_key_lengths(cache, q)
    if paged:
        _check_pages(cache, q.shape[2], options.window)
    if statistics is not None:
        _check_statistics(statistics, q, cache)


def refuse_gradients(**tensors: Any) -> None:
    """Raise where one of these tensors would have to carry a derivative."""
    for name, x in tensors.items():
        if isinstance(x, Tensor) and needs_graph(x):
            raise NotImplementedError(
                f"{name}: attention_decode has no gradient, got a tensor that requires one; call it under"
                " torch.no_grad() or torch.inference_mode(), or `attention`, which has"
            )


def _check_operand(name: str, x: Any, axes: str) -> None:
    check_tensor(name, x, axes)
    if x.dim() != 4:
        raise ValueError(f"{name}: expected 4 axes {axes}, got {x.dim()} in {shape_of(x)}")
    if x.dtype not in FLOATS:
        raise TypeError(f"{name}: expected float16, bfloat16, float32 or float64, got {x.dtype}")


def _check_alike(q: Tensor, cache: Cache) -> None:
    if not q.dtype == cache.k.dtype == cache.v.dtype:
        raise TypeError(f"q, k_cache, v_cache: expected one dtype, got {q.dtype}, {cache.k.dtype}, {cache.v.dtype}")
    for name, x in (("k_cache", cache.k), ("v_cache", cache.v)):
        check_device(name, x, q)
    if cache.k.shape[:3] != cache.v.shape[:3]:
        raise ValueError(f"v_cache: expected k_cache's {shape_of(cache.k)[:3]}, got {shape_of(cache.v)}")


def _check_sizes(q: Tensor, cache: Cache) -> None:
    batch, q_heads, q_len, head_dim = q.shape
    kv_heads = cache.k.shape[1 if cache.block_table is None else 2]
    if not 1 <= q_len <= LONGEST_QUERY:
        raise ValueError(f"q: expected Sq of 1 to {LONGEST_QUERY}, got {q_len}; for more rows: attention")
    if cache.block_table is None and cache.k.shape[0] != batch:
        raise ValueError(f"k_cache: expected q's batch size {batch}, got {cache.k.shape[0]}")
    if q_heads != kv_heads and (kv_heads == 0 or q_heads == 0 or q_heads % kv_heads != 0):
        hint = _exchanged(cache, q_heads)
        raise ValueError(f"k_cache: expected a number of heads that divides q's {q_heads}, got {kv_heads}{hint}")
    if cache.k.shape[3] != head_dim:
        raise ValueError(f"k_cache: expected q's head_dim {head_dim}, got {cache.k.shape[3]}")
    if head_dim == 0 or cache.v.shape[3] == 0:
        value_dim = cache.v.shape[3]
        raise ValueError(f"q, v_cache: expected head_dim of at least 1, got {head_dim} in q and {value_dim} in v_cache")
    if cache.block_table is not None and cache.page < SMALLEST_PAGE:
        hint = _exchanged(cache, q_heads)
        raise ValueError(f"k_cache: expected pages of at least {SMALLEST_PAGE} keys, got {cache.page}{hint}")
    if cache.capacity == 0:
        raise ValueError("k_cache: expected a capacity of at least 1 key, got 0")


def _exchanged(cache: Cache, q_heads: int) -> str:
    """The way out for a cache whose axes 1 and 2, heads and keys, would fit the other way round; else nothing."""
    paged = cache.block_table is not None
    heads, keys = cache.k.shape[1:3] if paged else (cache.k.shape[2], cache.k.shape[1])
    if heads == 0 or q_heads % heads != 0 or (paged and keys < SMALLEST_PAGE):
        return ""
    expected, got = "[N, page, Hkv, D]", "[N, Hkv, page, D]"
    if not paged:
        expected, got = "[B, Hkv, capacity, D]", "[B, capacity, Hkv, D]"
    return f": {shape_of(cache.k)} looks like {got}, not {expected}; pass k_cache.transpose(1, 2), and v_cache likewise"


def _check_key_lengths(cache: Cache, q: Tensor) -> None:
    lengths = cache.key_lengths
    check_integers("key_lengths", lengths, "[B]", q)
    if lengths.shape != q.shape[:1]:
        raise ValueError(f"key_lengths: expected shape [B] = [{q.shape[0]}], got {shape_of(lengths)}")
    check_values("key_lengths", lengths, cache.capacity, "capacity = ")


def _check_block_table(table: Any, q: Tensor) -> None:
    check_tensor("block_table", table, "[B, max_pages]")
    if table.dtype != torch.int32:
        raise TypeError(f"block_table: expected torch.int32, got {table.dtype}")
    check_device("block_table", table, q)
    if table.dim() != 2 or table.shape[0] != q.shape[0]:
        raise ValueError(f"block_table: expected [B, max_pages] = [{q.shape[0]}, max_pages], got {shape_of(table)}")


def _check_pages(cache: Cache, q_len: int, window: tuple[int | None, int | None] | None) -> None:
    """Check the pages that rows read; those behind key_lengths or before the window may belong to others by now."""
    table, lengths = cache.block_table, cache.key_lengths
    if table is None or not values_are_read(table) or not values_are_read(lengths):
        return
    lengths = lengths.long()  # uint8 has no number below 0
    first = torch.arange(table.shape[1], device=table.device) * cache.page
    used = first < lengths[:, None]
    left, _ = window_sides(window)
    if left is not None:
        used &= first + cache.page > (lengths - q_len - left)[:, None]
    wrong = table[used & ((table < 0) | (table >= cache.k.shape[0]))]
    if wrong.numel():
        raise ValueError(
            f"block_table: expected pages in [0, N = {cache.k.shape[0]}) up to key_lengths, got {int(wrong[0])}"
        )


def _check_statistics(statistics: Any, q: Tensor, cache: Cache) -> None:
    if not isinstance(statistics, KeyStatistics):
        raise TypeError(f"statistics: expected a KeyStatistics, got {kind_of(statistics)}")
    shape, wanted = statistics.lengths.shape, (cache.batch, cache.kv_heads, cache.capacity)
    if shape != wanted:
        raise ValueError(f"statistics: expected those of [B, Hkv, capacity] = {list(wanted)}, got {list(shape)}")
    check_device("statistics", statistics.counts, q)
    dtype = torch.promote_types(q.dtype, torch.float32)
    if statistics.lengths.dtype != dtype:
        raise TypeError(f"statistics: expected dtype {dtype} for q of {q.dtype}, got {statistics.lengths.dtype}")
    if values_are_read(statistics.counts) and values_are_read(cache.key_lengths):
        missing = statistics.counts < cache.key_lengths
        if missing.any():
            entry = int(missing.nonzero()[0])
            raise ValueError(
                f"statistics: expected all keys of key_lengths, new ones too (append first), got"
                f" {int(statistics.counts[entry])} of {int(cache.key_lengths[entry])} in sequence {entry}"
            )
