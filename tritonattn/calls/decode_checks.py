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
    Layout,
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
from .page_checks import (
    SMALLEST_PAGE,
    check_block_table,
    check_page_numbers,
    check_page_size,
    check_record,
    exchanged,
)
from .paged_statistics import PagedKeyStatistics, check_paged_statistics

_WHOLE = Layout("[B, Hq, Sq, D]", "[B, Hkv, capacity, D]", "[B, Hkv, capacity, Dv]", heads=1, sequence=2)
_IN_PAGES = Layout("[B, Hq, Sq, D]", "[N, page, Hkv, D]", "[N, page, Hkv, Dv]", heads=2, sequence=1)


def check_decode(
    q: Tensor, cache: Cache, statistics: KeyStatistics | PagedKeyStatistics | None, options: Options
) -> None:
    """Raise TypeError or ValueError unless these describe one decode call."""
    layout = _WHOLE if cache.block_table is None else _IN_PAGES
    check_cache(q, cache.k, cache.v, layout)
    if cache.block_table is not None:
        check_block_table(cache.block_table, q.shape[0], q)
    _check_sizes(q, cache, layout)
    check_flags(options)
    if options.window is not None:
        check_window(options.window)
    if options.sinks is not None:
        check_sinks(options.sinks, q)
    capacity = cache.capacity
    if options.key_bias is not None:
        keys = (cache.batch, cache.kv_heads, capacity)
        check_key_bias("key_bias", options.key_bias, q, keys, "[B, Hq or Hkv, capacity]")
    _check_lengths("key_lengths", cache.key_lengths, q, capacity, "capacity = ")
    if cache.query_lengths is not None:
        _check_lengths("query_lengths", cache.query_lengths, q, q.shape[2], "Sq = ")
    if cache.block_table is not None:
        _check_pages(cache, cache.block_table, q.shape[2], options.window)
    if statistics is not None:
        _check_statistics(statistics, q, cache)


def check_cache(q: Tensor, k: Tensor, v: Tensor, layout: Layout = _WHOLE) -> None:
    """Raise unless q and a cache have four axes, one dtype and one device."""
    _check_operand("q", q, layout.q)
    _check_operand("k_cache", k, layout.k)
    _check_operand("v_cache", v, layout.v)
    _check_alike(q, k, v)


def refuse_gradients(call: str = "attention_decode", /, **tensors: Any) -> None:
    """Raise where one of these tensors would have to carry a derivative of a `call`."""
    for name, x in tensors.items():
        if isinstance(x, Tensor) and needs_graph(x):
            raise NotImplementedError(
                f"{name}: {call} has no gradient, got a tensor that requires one; call it under"
                " torch.no_grad() or torch.inference_mode(), or `attention`, which has"
            )


def _check_operand(name: str, x: Any, axes: str) -> None:
    check_tensor(name, x, axes)
    if x.dim() != 4:
        raise ValueError(f"{name}: expected 4 axes {axes}, got {x.dim()} in {shape_of(x)}")
    if x.dtype not in FLOATS:
        raise TypeError(f"{name}: expected float16, bfloat16, float32 or float64, got {x.dtype}")


def _check_alike(q: Tensor, k: Tensor, v: Tensor) -> None:
    if not q.dtype == k.dtype == v.dtype:
        raise TypeError(f"q, k_cache, v_cache: expected one dtype, got {q.dtype}, {k.dtype}, {v.dtype}")
    for name, x in (("k_cache", k), ("v_cache", v)):
        check_device(name, x, q)
    if k.shape[:3] != v.shape[:3]:
        raise ValueError(f"v_cache: expected k_cache's {shape_of(k)[:3]}, got {shape_of(v)}")


def _check_sizes(q: Tensor, cache: Cache, layout: Layout) -> None:
    (batch, q_heads, q_len, head_dim), k = q.shape, cache.k.shape
    kv_heads, value_dim = k[layout.heads], cache.v.shape[3]
    if not 1 <= q_len <= LONGEST_QUERY:
        raise ValueError(f"q: expected Sq of 1 to {LONGEST_QUERY}, got {q_len}; for more rows: attention")
    if cache.block_table is None and k[0] != batch:
        raise ValueError(f"k_cache: expected q's batch size {batch}, got {k[0]}")
    if q_heads != kv_heads and (kv_heads == 0 or q_heads == 0 or q_heads % kv_heads != 0):
        layouts = ("[N, page, Hkv, D]", "[N, Hkv, page, D]", SMALLEST_PAGE)
        if cache.block_table is None:
            layouts = ("[B, Hkv, capacity, D]", "[B, capacity, Hkv, D]", 0)
        hint = exchanged(cache.k, q_heads, "k_cache", *layouts)
        raise ValueError(f"k_cache: expected a number of heads that divides q's {q_heads}, got {kv_heads}{hint}")
    if k[3] != head_dim:
        raise ValueError(f"k_cache: expected q's head_dim {head_dim}, got {k[3]}")
    if head_dim == 0 or value_dim == 0:
        raise ValueError(f"q, v_cache: expected head_dim of at least 1, got {head_dim} in q and {value_dim} in v_cache")
    if cache.block_table is not None:
        check_page_size("k_cache", cache.k, q_heads)
    if cache.capacity == 0:
        raise ValueError("k_cache: expected a capacity of at least 1 key, got 0")


def _check_lengths(name: str, lengths: Any, q: Tensor, highest: int, meaning: str) -> None:
    check_integers(name, lengths, "[B]", q)
    if lengths.shape != (q.shape[0],):
        raise ValueError(f"{name}: expected shape [B] = [{q.shape[0]}], got {shape_of(lengths)}")
    check_values(name, lengths, highest, meaning)


def _check_pages(cache: Cache, table: Tensor, q_len: int, window: tuple[int | None, int | None] | None) -> None:
    """Check the pages that rows read."""
    lengths = cache.key_lengths.long()  # uint8 has no number below 0
    left, _ = window_sides(window)
    rows = q_len if cache.query_lengths is None else cache.query_lengths.long()
    first = torch.zeros_like(lengths) if left is None else lengths - rows - left
    check_page_numbers(table, cache.page, cache.k.shape[0], first, lengths, "key_lengths")


def _check_statistics(statistics: Any, q: Tensor, cache: Cache) -> None:
    if isinstance(statistics, PagedKeyStatistics):
        check_paged_statistics(statistics, q, cache.k, cache.block_table)
        return
    if not isinstance(statistics, KeyStatistics):
        raise TypeError(f"statistics: expected a KeyStatistics, got {kind_of(statistics)}")
    check_record(statistics.norms, (cache.batch, cache.kv_heads, cache.capacity), "[B, Hkv, capacity]", q)
    if values_are_read(statistics.counts) and values_are_read(cache.key_lengths):
        missing = statistics.counts < cache.key_lengths
        if missing.any():
            entry = int(missing.nonzero()[0])
            raise ValueError(
                f"statistics: expected all keys of key_lengths, new ones too (append first), got"
                f" {int(statistics.counts[entry])} of {int(cache.key_lengths[entry])} in sequence {entry}"
            )
