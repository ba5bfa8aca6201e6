"""Global memory's buffers: the tensors of a launch, at made-up addresses too far apart for an overrun to be missed."""

from __future__ import annotations

import collections
from typing import NamedTuple

import numpy as np
import torch
from numpy import uint8 as u1

from .errors import PTXError

SLOT_BITS = 36  # every buffer sits in the middle of 64 GiB without others
_MIDDLE = 1 << (SLOT_BITS - 1)


class Span(NamedTuple):
    """Bytes [start, end) of a buffer, and what lies there."""

    start: int
    end: int
    label: str


class Buffer(NamedTuple):
    """Bytes that the kernel may access.

    data        the host's memory, uint8
    spans       the tensors in it, by their start
    valid       which bytes belong to an element of a tensor; None: those of the first span
    granularity the smallest element, bytes: validity is the same within one
    writable    whether `data` takes what the kernel wrote
    """

    data: np.ndarray
    spans: tuple[Span, ...]
    valid: np.ndarray | None = None
    granularity: int = 1
    writable: bool = False

    @classmethod
    def plain(cls, data: np.ndarray, label: str) -> Buffer:
        """Bytes that are all valid and that only the kernel reads."""
        return cls(data, (Span(0, len(data), label),))


class _View(NamedTuple):
    start: int
    end: int
    argument: int
    tensor: torch.Tensor


def slot_address(slot: int) -> int:
    """Address of the first byte of buffer number `slot`."""
    return ((slot + 1) << SLOT_BITS) + _MIDDLE


def slot_of(address: int) -> int:
    return (address >> SLOT_BITS) - 1


def describe(buffers: list[Buffer], address: int) -> str:
    """The buffer nearest to an address, and its distance."""
    slot = slot_of(address)
    if not 0 <= slot < len(buffers):
        return "no tensor near (null or wild pointer)"
    offset = address - slot_address(slot)

    def distance(span: Span) -> int:
        return max(span.start - offset, offset - span.end + 1, 0)

    nearest = min(buffers[slot].spans, key=distance)
    if offset < nearest.start:
        return f"{nearest.start - offset} bytes before the start of {nearest.label}"
    if offset >= nearest.end:
        return f"{offset - nearest.end} bytes past the end of {nearest.label}"
    return f"inside {nearest.label}, byte offset {offset - nearest.start}"


def lay_out_tensors(arguments: list, names: list[str], buffers: list[Buffer]) -> dict[int, int]:
    """Add the buffers of all tensors; addresses by argument. Views of one storage share a buffer where they overlap."""
    by_storage = collections.defaultdict(list)
    for argument, tensor in enumerate(arguments):
        if isinstance(tensor, torch.Tensor):
            if tensor.device.type != "cpu":
                raise PTXError(f"argument {argument}: expected a CPU tensor, got one on {tensor.device}")
            view = _view(argument, tensor)
            by_storage[tensor.untyped_storage().data_ptr() or ("empty", argument)].append(view)
    addresses = {}
    for views in by_storage.values():
        for group in _overlapping(sorted(views, key=lambda view: view[:3])):
            base = slot_address(len(buffers))
            buffer, start = _buffer_of(group, names)
            buffers.append(buffer)
            addresses.update((view.argument, base + view.start - start) for view in group)
    return addresses


def _view(argument: int, tensor: torch.Tensor) -> _View:
    reach = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    start = tensor.storage_offset() * tensor.element_size()
    extent = (1 + reach) * tensor.element_size() if tensor.numel() else 0
    return _View(start, start + extent, argument, tensor)


def _overlapping(views: list[_View]) -> list[list[_View]]:
    groups = []
    for view in views:
        if groups and view.start < max(other.end for other in groups[-1]):
            groups[-1].append(view)
        else:
            groups.append([view])
    return groups


def _buffer_of(views: list[_View], names: list[str]) -> tuple[Buffer, int]:
    """A buffer over the views, and the byte of their storage where it starts: a multiple of 512."""
    start, end = min(view.start for view in views) & ~511, max(view.end for view in views)
    storage = views[0].tensor.untyped_storage()
    data = torch.empty(0, dtype=torch.uint8).set_(storage, 0, (storage.nbytes(),)).numpy()[start:end]
    gaps = any(view.tensor.numel() * view.tensor.element_size() != view.end - view.start for view in views)
    spans = tuple(Span(view.start - start, view.end - start, _label(view, names)) for view in views)
    granularity = min(view.tensor.element_size() for view in views)
    valid = _valid_bytes(views, start, end) if gaps or len(views) > 1 else None
    return Buffer(data, spans, valid, granularity, writable=True), start


def _label(view: _View, names: list[str]) -> str:
    dtype = str(view.tensor.dtype).removeprefix("torch.")
    return f"arg {view.argument} {names[view.argument]} {dtype}{list(view.tensor.shape)}"


def _valid_bytes(views: list[_View], start: int, end: int) -> np.ndarray:
    valid = torch.zeros(max(end - start, 1), dtype=torch.bool)
    for view in views:
        size = view.tensor.element_size()
        strides = [stride * size for stride in view.tensor.stride()]
        valid.as_strided((*view.tensor.shape, size), (*strides, 1), view.start - start).fill_(True)
    return valid.numpy()


def poisoned(size: int) -> np.ndarray:
    """Bytes that are NaN in every float format."""
    return np.full(size, 0xFF, u1)
