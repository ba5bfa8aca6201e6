"""Launches in Triton's interpreter, and the tensors among a kernel's arguments."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

_READ_ONLY = ("q", "k", "v", "d_out", "terms", "tangents", "masks", "sinks")


def run_interpreted(kernel: Any, grid: tuple[int, int, int], arguments: Mapping[str, Any], _: Any) -> None:
    """Launch under TRITON_INTERPRET=1 with bf16 widened to fp32, and round the results back to nearest even.

    Triton's interpreter computes on the raw bits of bf16 and truncates when it converts (triton issues 11584, 11604).
    P and dS are not rounded to bf16, so an interpreted result is closer to exact than a GPU's.
    """
    wide = {name: map_tensors(_widened, value) for name, value in arguments.items()}
    kernel[grid](**wide)
    for name, value in arguments.items():
        if name not in _READ_ONLY:
            for tensor, result in zip(tensors_of([value]), tensors_of([wide[name]]), strict=True):
                # Autograd watches for writes and refuses a second backward: what was only read is not written.
                if result is not tensor and not torch.equal(tensor.float(), result):
                    tensor.copy_(result)


def tensors_of(values: Iterable[Any]) -> Iterator[Tensor]:
    """The tensors among a kernel's arguments, and in their records."""
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, tuple):
            yield from tensors_of(value)


def map_tensors(function: Callable[[Tensor], Tensor], value: Any) -> Any:
    """A kernel's argument with function(x) for each tensor x, also in a record."""
    if isinstance(value, Tensor):
        return function(value)
    if isinstance(value, tuple):
        return type(value)(*(map_tensors(function, field) for field in value))
    return value


def _widened(tensor: Tensor) -> Tensor:
    """An fp32 copy of a bf16 tensor with its strides, shared elements of expanded tensors included; others as is."""
    if tensor.dtype != torch.bfloat16:
        return tensor
    extent = 1 + sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    flat = tensor.as_strided((max(extent, 0),), (1,)).float()
    return flat.as_strided(tensor.shape, tensor.stride(), 0)
