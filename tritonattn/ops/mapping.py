"""vmap rules for operators whose tensors begin with the batch axis."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor


def in_one_batch(operator: Callable, size: int, in_dims: Sequence, arguments: Sequence):
    """Fold the mapped axis into the batch axis, the first of every tensor. A 1-D result stands for None."""
    dims = _tensor_dims(in_dims, arguments)
    batch = arguments[0].shape[0 if dims[0] is None else int(dims[0] == 0)]
    folded = (_fold(x, dim, size, batch) for x, dim in zip(arguments, dims, strict=True))
    outputs = operator(*folded)
    if isinstance(outputs, Tensor):
        return outputs.unflatten(0, (size, batch)), 0
    unfolded = (x if x.dim() == 1 else x.unflatten(0, (size, batch)) for x in outputs)
    return tuple(unfolded), tuple(None if x.dim() == 1 else 0 for x in outputs)


def in_a_loop(operator: Callable, size: int, in_dims: Sequence, arguments: Sequence):
    """Call the operator once for every entry of the mapped axis."""
    dims = _tensor_dims(in_dims, arguments)

    def entry(i: int):
        pairs = zip(arguments, dims, strict=True)
        return operator(*(x if dim is None else x.select(dim, i) for x, dim in pairs))

    outputs = [entry(i) for i in range(size)]
    return tuple(torch.stack(output) for output in zip(*outputs, strict=True)), (0,) * len(outputs[0])


def _tensor_dims(in_dims: Sequence, arguments: Sequence) -> list[int | None]:
    return [dim if isinstance(x, Tensor) else None for x, dim in zip(arguments, in_dims, strict=True)]


def _fold(x: Any, dim: int | None, size: int, batch: int) -> Any:
    """[B or 1, ...] with a mapped axis at `dim`, or without: [size * B, ...]; a shared mask stays."""
    if not isinstance(x, Tensor) or (dim is None and x.shape[0] == 1 != batch):
        return x
    x = x[None] if dim is None else x.movedim(dim, 0)
    return x.expand(size, batch, *x.shape[2:]).flatten(0, 1)
