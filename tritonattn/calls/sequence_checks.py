"""Checks of where the keys of sequences lie, of records of keys and of descales, by the rules of checks.py."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..core.autograd import values_are_read
from ..core.eight_bit import EIGHT_BIT, Descale
from ..core.hints import type_of
from ..core.visibility import Visibility
from .checks import FLOATS, as_float, broadcasts, check_number, check_tensor, scale_dtype, shape_of

_FEW = 64  # numbers that Python compares sooner than an operator of torch


def check_values(name: str, x: Tensor, highest: int, meaning: str = "Sk = ") -> None:
    """Raise where a value of a CPU tensor is outside [0, highest]."""
    if not values_are_read(x):
        return
    if x.numel() <= _FEW:  # one read
        numbers = x.flatten().tolist()
        low, high = min(numbers), max(numbers)
    else:
        low, high = map(int, x.aminmax())
    if low < 0 or high > highest:
        raise ValueError(f"{name}: expected values in [0, {meaning}{highest}], got {low if low < 0 else high}")


def check_order(key_ranges: Tensor) -> None:
    """Raise where a range [lo, hi) of a CPU tensor [B, ..., Sq, 2] ends before it begins."""
    if values_are_read(key_ranges) and (is_reversed := key_ranges[..., 0] > key_ranges[..., 1]).any():
        place = is_reversed.nonzero()[0].tolist()
        lo, hi = key_ranges[tuple(place)].tolist()
        got = f"({lo}, {hi}) in row {place[-1]} of batch entry {place[0]}"
        raise ValueError(f"key_ranges: expected lo <= hi, got {got}; a row without keys is lo = hi")


def check_offsets(name: str, offsets: Any, like: Tensor | None = None, owner: str = "q") -> None:
    """Raise unless these are int32 [N + 1], on the device of `like`, which belongs to `owner`."""
    check_tensor(name, offsets, "[N + 1]", (torch.int32,), like, owner, (None,))
    if offsets.shape[0] == 0:
        raise ValueError(f"{name}: expected shape [N + 1] for N sequences, got {shape_of(offsets)}")


def check_offset_values(name: str, offsets: Tensor, length: int, axis: str, longest: int | None = None) -> None:
    """Raise on a CPU unless offsets begin with 0, do not fall, end within `axis`, and are at most `longest` apart."""
    if not values_are_read(offsets):
        return
    first, last, lengths = int(offsets[0]), int(offsets[-1]), offsets.diff()
    least, most = map(int, lengths.aminmax()) if lengths.numel() else (0, 0)
    if first != 0:
        raise ValueError(f"{name}: expected a first offset of 0, got {first}")
    if least < 0:
        at = int((lengths < 0).int().argmax())
        got = f"{int(offsets[at + 1])} after {int(offsets[at])}"
        raise ValueError(f"{name}: expected offsets that do not fall, got {got}")
    if last > length:
        raise ValueError(f"{name}: expected offsets of at most {axis} = {length}, got {last}")
    if longest is not None and most > longest:
        limit = f"max_seqlen{name.removeprefix('cu_seqlens')}"
        raise ValueError(f"{limit}: expected at least the longest sequence, {most}, got {longest}")


def check_block_table(table: Any, sequences: int, like: Tensor, owner: str = "q") -> None:
    """Raise unless this is int32 [B, max_pages] on the device of `like`, which belongs to `owner`."""
    check_tensor("block_table", table, "[B, max_pages]", (torch.int32,), like, owner, (sequences, None))


def check_page_numbers(table: Tensor, page: int, pages: int, first: Tensor, end: Tensor, bound: str) -> None:
    """Check the pages of the keys first <= j < end, int64 [B], which are read: others may have new owners by now.

    bound   the argument that `end` comes from
    """
    lowest, highest = map(int, table.aminmax())
    if lowest >= 0 and highest < pages:  # behind `end` too
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
    check_tensor("k_new", k_new, axes, FLOATS, like, owner, (*sizes, None))
    if k_new.shape[-1] == 0:
        raise ValueError(f"k_new: expected D of at least 1, got {shape_of(k_new)}")


def check_record(norms: Tensor, shape: tuple[int, ...], axes: str, q: Tensor) -> None:
    """Raise unless cached norms fit the cache of a call with this q."""
    check_tensor("statistics", norms, axes, like=q, sizes=shape)
    dtype = torch.promote_types(q.dtype, torch.float32)
    if norms.dtype != dtype:
        raise TypeError(f"statistics: expected dtype {dtype} for q of {q.dtype}, got {norms.dtype}")


def descale_of(name: str, x: Any, q: Tensor, k: Tensor, visible: Visibility) -> Descale:
    """A descale of checked operands as of `core.eight_bit`. Raises unless they have one."""
    if k.dtype != EIGHT_BIT:
        raise ValueError(f"{name}: expected None for keys and values of {k.dtype}, got {type_of(x)}")
    if not isinstance(x, Tensor):
        check_number(name, x)
        return as_float(x)
    sequences, shape, axes = visible.sequences, (visible.batch, visible.kv_heads), "[B, Hkv]"
    if sequences is not None:
        shape, axes = (sequences.q_starts.shape[0] - 1, visible.kv_heads), "[N, Hkv]"
    check_tensor(name, x, axes, FLOATS, q)
    if not broadcasts(x.shape, shape):
        raise ValueError(f"{name}: expected a shape broadcastable to {axes} = {list(shape)}, got {shape_of(x)}")
    return x.to(scale_dtype(q))[(None,) * (2 - x.dim())]
