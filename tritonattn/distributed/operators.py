"""Sharding rules of the operators, read off their schemas: a DTensor meets one where it is an argument of an operator.

Every dimension of a mesh can hold replicas, entries of the batch, or heads; keys, values and all that has heads are
sharded alike. Other placements are redistributed to one of these.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Iterator
from typing import Any

import torch
from torch.distributed.tensor import Partial, Placement, Replicate, Shard
from torch.distributed.tensor.experimental import register_sharding

from ..calls.dtensors import BATCHED, NOWHERE, OPERAND, ROWS, Axes
from ..core.terms import PAIRS
from ..ops.operators import NAMESPACE, OPERATORS

_PAGES = Axes(None, 1)
_AXES = {
    **{name: BATCHED[name] for name in ("key_lengths", "key_ranges", "mask", *PAIRS)},
    **dict.fromkeys(("seen", "lo", "hi", "restarts"), ROWS),
    **dict.fromkeys(("q_starts", "k_starts", "dropout_state"), NOWHERE),
    **dict.fromkeys(("row_counts", "block_table"), Axes(0, None)),
}  # and OPERAND
_AXES |= {f"tangent_{name}": _AXES[name] for name in PAIRS}


def register() -> None:
    """Register the rules of all operators with DTensor."""
    for name in OPERATORS:
        overload = getattr(getattr(torch.ops, NAMESPACE), name).default
        register_sharding(overload)(functools.partial(_rules, overload))


def _rules(overload: Any, *arguments: Any) -> list[tuple[list[Placement], list[Placement | None]]]:
    """Placements of results and arguments, for every meaning that one dimension of the mesh can have."""
    given = {one.name: x for one, x in zip(overload._schema.arguments, arguments, strict=True)}
    tensors = {name: x for name, x in given.items() if hasattr(x, "placements")}
    axes = dict.fromkeys(tensors, OPERAND) | {name: axis for name, axis in _AXES.items() if name in tensors}
    if "block_table" in tensors:
        axes |= dict.fromkeys(("k", "v"), _PAGES)
    results = overload(*(_without_memory(x) if name in tensors else x for name, x in given.items()))
    named = zip(overload._schema.returns, results if isinstance(results, tuple) else (results,), strict=True)
    shapes = {one.name: x.shape for one, x in named}

    rules = []
    for meaning in _meanings(tensors, axes):
        placed = {name: _placed(axes[name].of(x, meaning)) for name, x in tensors.items()}
        of_results = [_of_result(name, shape, meaning, placed) for name, shape in shapes.items()]
        rules.append((of_results, [placed.get(name) for name in given]))
    return rules


def _without_memory(spec: Any) -> torch.Tensor:
    return torch.empty(spec.shape, dtype=spec.tensor_meta.dtype, device="meta")


def _placed(axis: int | None) -> Placement:
    return Replicate() if axis is None else Shard(axis)


def _of_result(name: str, shape: torch.Size, meaning: str | None, placed: dict[str, Placement]) -> Placement:
    if 0 in shape:  # not asked for
        return Replicate()
    if not name.startswith("d_"):
        return _placed(None if meaning is None else getattr(OPERAND, meaning))
    placement = placed[name.removeprefix("d_")]
    return Partial() if placement.is_replicate() and meaning is not None else placement


def _meanings(tensors: dict[str, Any], axes: dict[str, Axes]) -> Iterator[str | None]:
    """Meanings of an axis: None (replicas), and "batch" and "heads" where the mesh divides them evenly."""
    yield None
    if "dropout_state" in tensors:  # a mask counts the batch entries and heads of the whole call
        return
    mesh = next(iter(tensors.values())).mesh.shape
    parts = [math.prod(some) for n in range(len(mesh)) for some in itertools.combinations(mesh, n + 1)]
    for meaning in ("batch", "heads"):
        found = [(x, axes[name].of(x, meaning)) for name, x in tensors.items()]
        sizes = {x.shape[axis] for x, axis in found if axis is not None}
        if all(size % part == 0 for size in sizes for part in parts if part <= size):
            yield meaning
