"""Checks of pages, of the table that names them, and of the statistics of a cache, by the rules of checks.py."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .checks import FLOATS, check_device, check_tensor, shape_of, values_are_read

SMALLEST_PAGE = 16


def check_page_size(name: str, x: Tensor, q_heads: int) -> None:
    """Raise unless the pages x [N, page, Hkv, D] hold enough keys."""
    if x.shape[1] < SMALLEST_PAGE:
        hint = exchanged(x, q_heads, name, "[N, page, Hkv, D]", "[N, Hkv, page, D]", SMALLEST_PAGE)
        raise ValueError(f"{name}: expected pages of at least {SMALLEST_PAGE} keys, got {x.shape[1]}{hint}")


def exchanged(x: Tensor, q_heads: int, name: str, expected: str, got: str, fewest: int = 0) -> str:
    """A hint for a cache whose axes 1 and 2, heads and keys, would fit if they were exchanged; "" otherwise."""
    at = got.split(", ").index("Hkv")
    heads, keys = x.shape[at], x.shape[3 - at]
    if heads == 0 or q_heads % heads != 0 or keys < fewest:
        return ""
    values = "v" + name[1:]
    return f": {shape_of(x)} looks like {got}, not {expected}; pass {name}.transpose(1, 2), and {values} likewise"


def check_block_table(table: Any, sequences: int, like: Tensor, owner: str = "q") -> None:
    """Raise unless this is int32 [B, max_pages] on the device of `like`, which belongs to `owner`."""
    check_tensor("block_table", table, "[B, max_pages]")
    if table.dtype != torch.int32:
        raise TypeError(f"block_table: expected torch.int32, got {table.dtype}")
    check_device("block_table", table, like, owner)
    if table.dim() != 2 or table.shape[0] != sequences:
        raise ValueError(f"block_table: expected [B, max_pages] = [{sequences}, max_pages], got {shape_of(table)}")


def check_page_numbers(table: Tensor, page: int, pages: int, first: Tensor, end: Tensor, bound: str) -> None:
    """On a CPU, check the pages of the keys first <= j < end, int64 [B]: the others may belong to others by now.

    bound   the argument that `end` comes from
    """
    if not values_are_read(table, first, end):
        return
    start = torch.arange(table.shape[1], device=table.device) * page
    used = (start < end[:, None]) & (start + page > first[:, None])
    wrong = table[used & ((table < 0) | (table >= pages))]
    if wrong.numel():
        raise ValueError(f"block_table: expected pages in [0, N = {pages}) up to {bound}, got {int(wrong[0])}")


def check_new_keys(k_new: Any, axes: str, sizes: tuple[int | None, ...], like: Tensor, owner: str) -> None:
    """Raise unless these are keys for a record of an `owner`, on the device of `like`.

    sizes   of the axes before D, None where any does
    """
    check_tensor("k_new", k_new, axes)
    if k_new.dtype not in FLOATS:
        raise TypeError(f"k_new: expected a floating dtype, got {k_new.dtype}")
    shape = tuple(k_new.shape)
    allowed = tuple(x if one is None else one for one, x in zip(sizes, shape[:-1], strict=False))
    if len(shape) != len(sizes) + 1 or allowed != shape[:-1]:
        names = axes.strip("[]").split(", ")
        wanted = [name if one is None else str(one) for name, one in zip(names, (*sizes, None), strict=True)]
        raise ValueError(f"k_new: expected {axes} = [{', '.join(wanted)}], got {shape_of(k_new)}")
    if shape[-1] == 0:
        raise ValueError(f"k_new: expected D of at least 1, got {shape_of(k_new)}")
    check_device("k_new", k_new, like, owner)


def check_record(norms: Tensor, shape: tuple[int, ...], axes: str, q: Tensor) -> None:
    """Raise unless the norms of a record are those of a cache of q."""
    if norms.shape != shape:
        raise ValueError(f"statistics: expected those of {axes} = {list(shape)}, got {shape_of(norms)}")
    check_device("statistics", norms, q)
    dtype = torch.promote_types(q.dtype, torch.float32)
    if norms.dtype != dtype:
        raise TypeError(f"statistics: expected dtype {dtype} for q of {q.dtype}, got {norms.dtype}")
