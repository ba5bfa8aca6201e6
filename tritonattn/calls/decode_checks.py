"""Check the arguments of `attention_decode`, by the rules of checks.py."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..core.call import LONGEST_QUERY
from ..core.visibility import Visibility, window_sides
from .checks import (
    CACHE,
    Layout,
    check_integers,
    check_masks,
    check_values,
    kind_of,
    operands,
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

_WHOLE = Layout("[B, Hq, Sq, D]", "[B, Hkv, capacity, D]", "[B, Hkv, capacity, Dv]", 1, 2, CACHE)
_IN_PAGES = Layout("[B, Hq, Sq, D]", "[N, page, Hkv, D]", "[N, page, Hkv, Dv]", 2, 1, CACHE)


def cache_operands(q: Tensor, k: Tensor, v: Tensor, block_table: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """q, k_cache and v_cache of a call, in autocast's dtype where it is on, and pages with heads before keys.

    Raises TypeError or ValueError unless these are the operands of one call.
    """
    layout = _WHOLE if block_table is None else _IN_PAGES
    q, k, v = operands(q, k, v, layout)
    if block_table is not None:
        check_block_table(block_table, q.shape[0], q)
    _check_sizes(q, k, v, block_table, layout)
    return (q, k, v) if block_table is None else (q, k.transpose(1, 2), v.transpose(1, 2))


def cache_visibility(
    q: Tensor,
    k: Tensor,
    key_lengths: Tensor,
    block_table: Tensor | None = None,
    query_lengths: Tensor | None = None,
    window: tuple[int | None, int | None] | None = None,
    batch_invariant: bool | None = None,
) -> Visibility:
    """The keys that each row attends to, of `cache_operands`; raises for lengths and pages that are none of theirs."""
    invariant = check_masks(True, window, batch_invariant)
    (batch, q_heads, q_len, _), capacity = q.shape, capacity_of(k, block_table)
    _check_lengths("key_lengths", key_lengths, q, capacity, "capacity = ")
    if query_lengths is not None:
        _check_lengths("query_lengths", query_lengths, q, q_len, "Sq = ")
    left = None if window is None else window_sides(window)[0]
    if block_table is not None:
        lengths = key_lengths.long()  # uint8 has no number below 0
        rows = q_len if query_lengths is None else query_lengths.long()
        first = torch.zeros_like(lengths) if left is None else lengths - rows - left
        check_page_numbers(block_table, k.shape[2], k.shape[0], first, lengths, "key_lengths")
    sizes = (batch, q_heads, k.shape[1], q_len, capacity)
    return Visibility.of_padded(sizes, q.device, key_lengths, query_lengths, left=left, invariant=invariant)


def _check_sizes(q: Tensor, k: Tensor, v: Tensor, block_table: Tensor | None, layout: Layout) -> None:
    batch, q_heads, q_len, head_dim = q.shape
    kv_heads, value_dim = k.shape[layout.heads], v.shape[3]
    if not 1 <= q_len <= LONGEST_QUERY:
        raise ValueError(f"q: expected Sq of 1 to {LONGEST_QUERY}, got {q_len}; for more rows: attention")
    if block_table is None and k.shape[0] != batch:
        raise ValueError(f"k_cache: expected q's batch size {batch}, got {k.shape[0]}")
    if q_heads != kv_heads and (kv_heads == 0 or q_heads == 0 or q_heads % kv_heads != 0):
        layouts = ("[N, page, Hkv, D]", "[N, Hkv, page, D]", SMALLEST_PAGE)
        if block_table is None:
            layouts = ("[B, Hkv, capacity, D]", "[B, capacity, Hkv, D]", 0)
        hint = exchanged(k, q_heads, "k_cache", *layouts)
        raise ValueError(f"k_cache: expected a number of heads that divides q's {q_heads}, got {kv_heads}{hint}")
    if k.shape[3] != head_dim:
        raise ValueError(f"k_cache: expected q's head_dim {head_dim}, got {k.shape[3]}")
    if head_dim == 0 or value_dim == 0:
        raise ValueError(f"q, v_cache: expected head_dim of at least 1, got {head_dim} in q and {value_dim} in v_cache")
    if block_table is not None:
        check_page_size("k_cache", k, q_heads)
    if (k.shape[2] if block_table is None else block_table.shape[1]) == 0:
        raise ValueError("k_cache: expected a capacity of at least 1 key, got 0")


def _check_lengths(name: str, lengths: Any, q: Tensor, highest: int, meaning: str) -> None:
    check_integers(name, lengths, "[B]", q)
    if lengths.shape != (q.shape[0],):
        raise ValueError(f"{name}: expected shape [B] = [{q.shape[0]}], got {shape_of(lengths)}")
    check_values(name, lengths, highest, meaning)


def check_statistics(statistics: Any, q: Tensor, k: Tensor, key_lengths: Tensor, block_table: Tensor | None) -> None:
    """Raise unless these are statistics of the keys of `cache_operands`."""
    if isinstance(statistics, PagedKeyStatistics):
        check_paged_statistics(statistics, q, k.transpose(1, 2), block_table)
        return
    if not isinstance(statistics, KeyStatistics):
        raise TypeError(f"statistics: expected a KeyStatistics, got {kind_of(statistics)}")
    wanted = (q.shape[0], k.shape[1], capacity_of(k, block_table))
    check_record(statistics.norms, wanted, "[B, Hkv, capacity]", q)
    if values_are_read(statistics.counts) and values_are_read(key_lengths):
        missing = statistics.counts < key_lengths
        if missing.any():
            entry = int(missing.nonzero()[0])
            raise ValueError(
                f"statistics: expected all keys of key_lengths, new ones too (append first), got"
                f" {int(statistics.counts[entry])} of {int(key_lengths[entry])} in sequence {entry}"
            )


def capacity_of(k: Tensor, block_table: Tensor | None) -> int:
    """The most keys that a sequence can have: k [B, Hkv, capacity, D], or pages [N, Hkv, page, D]."""
    return k.shape[2] if block_table is None else k.shape[2] * block_table.shape[1]
