"""Pad a whole sequence, cut it into the parts of ranks, and put it together again."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from ..calls.checks import check_tensor, shape_of
from . import collectives
from .agreement import require_agreement
from .layout import Split, refuse_dtensors


def shard(x: Tensor, *, mesh: DeviceMesh, layout: str = "contiguous", dim: int = 2) -> Tensor:
    """Take this rank's part of a whole sequence along an axis.

    Args:
        x: The same on every rank; axis `dim` of S tokens, which P (2 P for "zigzag") divides.
        mesh: The P ranks that share a sequence: one dimension.
        layout: "contiguous", or "zigzag", which gives every rank the same work under causal attention.
        dim: The axis of tokens: 2 in q, k and v [B, H, S, D]; 1 in token ids, positions and labels [B, S].

    Returns:
        A copy, with S / P tokens. Its gradient is that of this rank's tokens, and zeros elsewhere.

    Raises:
        TypeError, ValueError: mesh, layout, a DTensor, or an axis that cannot be divided.

    >>> import torch, torch.distributed as dist
    >>> from torch.distributed.device_mesh import init_device_mesh
    >>> from tritonattn.distributed import shard
    >>> dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)  # torchrun starts more
    >>> mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    >>> shard(torch.arange(8).view(1, 8), mesh=mesh, layout="zigzag", dim=1)
    tensor([[0, 1, 2, 3, 4, 5, 6, 7]])
    >>> dist.destroy_process_group()
    """
    split = Split.of(mesh, layout)
    _check_axis(x, dim)
    if x.shape[dim] % split.chunk_count:
        raise ValueError(
            f"x: expected a number of tokens that {split.chunk_count} divides ({layout!r} over {split.size} ranks),"
            f" got {x.shape[dim]}; pad the sequence (tritonattn.distributed.pad), or end it with a document of padding"
        )
    parts = x.chunk(split.chunk_count, dim)
    return torch.cat([parts[chunk] for chunk in split.chunks()], dim)


def pad(x: Tensor, *, mesh: DeviceMesh, layout: str = "contiguous", dim: int = 2, value: float = 0) -> Tensor:
    """Append tokens to a whole sequence until `shard` can cut it.

    Args:
        x: The same on every rank; axis `dim` of S tokens.
        mesh, layout, dim: As in `shard`.
        value: Fills the new tokens: -100 in labels, so that no loss counts them.

    Returns:
        x with the next number of tokens that P (2 P for "zigzag") divides. Rows of causal attention do not attend to
        later tokens. Other rows do: make the padding a document, by cu_seqlens = [0, S, the padded length]. After
        `unshard` cut it off, as in x[:, :, :S].

    Raises:
        TypeError, ValueError: mesh, layout, a DTensor, or an axis that x lacks.

    >>> import torch, torch.distributed as dist
    >>> from torch.distributed.device_mesh import init_device_mesh
    >>> from tritonattn.distributed import pad
    >>> dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)  # torchrun starts more
    >>> mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    >>> pad(torch.arange(1, 6).view(1, 5), mesh=mesh, layout="zigzag", dim=1, value=-100)
    tensor([[   1,    2,    3,    4,    5, -100]])
    >>> dist.destroy_process_group()
    """
    split = Split.of(mesh, layout)
    _check_axis(x, dim)
    behind = x.dim() - 1 - dim % x.dim()
    return torch.nn.functional.pad(x, (0, 0) * behind + (0, -x.shape[dim] % split.chunk_count), value=value)


def _check_axis(x: Tensor, dim: int) -> None:
    refuse_dtensors(x=x)
    check_tensor("x", x, "[..., S, ...]")
    if not -x.dim() <= dim < x.dim():
        raise ValueError(f"dim: expected an axis of x, whose shape is {shape_of(x)}, got {dim}")


def unshard(x: Tensor, *, mesh: DeviceMesh, layout: str = "contiguous", dim: int = 2) -> Tensor:
    """Gather the parts of all ranks into the whole sequence, in its order: the inverse of `shard`.

    Args:
        x: This rank's part, of one shape on all ranks.
        mesh, layout, dim: As in `shard`.

    Returns:
        The whole sequence on every rank. A rank's gradient is the sum over ranks of those towards its tokens.

    Raises:
        TypeError, ValueError: mesh, layout, a DTensor; on every rank, a shape, dtype, layout or dim that differs by
            rank, in the first call with these.

    >>> import torch, torch.distributed as dist
    >>> from torch.distributed.device_mesh import init_device_mesh
    >>> from tritonattn.distributed import shard, unshard
    >>> dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)  # torchrun starts more
    >>> mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    >>> part = shard(torch.arange(8).view(1, 8), mesh=mesh, layout="zigzag", dim=1)
    >>> unshard(part, mesh=mesh, layout="zigzag", dim=1)
    tensor([[0, 1, 2, 3, 4, 5, 6, 7]])
    >>> dist.destroy_process_group()
    """
    split = Split.of(mesh, layout)
    refuse_dtensors(x=x)
    check_tensor("x", x, "[..., S / P, ...]")
    require_agreement(split, "unshard", x=x, layout=layout, dim=dim)
    return collectives.gather(x, split, dim)
