"""What runs on every rank: a call over ranks against the same call in one process."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

import tritonattn
from tritonattn.distributed import context_parallel_attention, shard

LENGTH, HEADS, KV_HEADS, DIM = 48, 4, 2, 8
OFFSETS = (0, 5, 20, 21, 48)
MASKS: dict[str, dict[str, Any]] = {
    "full": {},
    "causal": {"causal": True},
    "window": {"causal": True, "window": (10, None)},
    "two-sided": {"window": (9, 5)},
    "documents": {"causal": True, "cu_seqlens": OFFSETS},
    "full documents": {"cu_seqlens": OFFSETS},
}


def mesh_of(size: int) -> DeviceMesh:
    """The mesh of `size` ranks that this one belongs to."""
    return init_device_mesh("cpu", (dist.get_world_size() // size, size), mesh_dim_names=("other", "cp"))["cp"]


def in_one_process(mask: dict[str, Any], batch: int) -> dict[str, Any]:
    """The arguments of `attention` for a mask of `MASKS`."""
    mask = dict(mask)
    offsets = mask.pop("cu_seqlens", None)
    if offsets is not None:
        pairs = [(a, b) for a, b in zip(offsets, offsets[1:], strict=False) for _ in range(b - a)]
        mask["key_ranges"] = torch.tensor(pairs).expand(batch, -1, -1)
    return mask


def errors(rank: int, size: int, method: str, layout: str, mask: str, scaling: Any, dtype=torch.float64, **options: Any):
    """Largest error of output and gradients, each relative to the largest value, on this rank."""
    mesh = mesh_of(size)
    torch.manual_seed(0)
    shapes = ((HEADS, DIM), (KV_HEADS, DIM), (KV_HEADS, DIM + 4))
    whole = [torch.randn(2, heads, LENGTH, dim, dtype=dtype) for heads, dim in shapes]
    d_out = torch.randn(2, HEADS, LENGTH, DIM + 4, dtype=dtype)
    gain, sinks = torch.rand(HEADS, 1, dtype=dtype) + 0.5, torch.randn(HEADS, dtype=dtype)
    one = [x.clone().requires_grad_() for x in (*whole, gain, sinks)]
    out = tritonattn.attention(
        *one[:3], scaling=scaling, gain=one[3], sinks=one[4], **in_one_process(MASKS[mask], 2), **options
    )
    out.backward(d_out)
    parts = [shard(x, mesh=mesh, layout=layout) for x in whole]
    own = [x.clone().requires_grad_() for x in (*parts, gain, sinks)]
    given = dict(MASKS[mask])
    if "cu_seqlens" in given:
        given["cu_seqlens"] = torch.tensor(given["cu_seqlens"], dtype=torch.int32)
    got = context_parallel_attention(
        *own[:3], mesh=mesh, method=method, layout=layout, scaling=scaling, gain=own[3], sinks=own[4], **given, **options
    )
    got.backward(shard(d_out, mesh=mesh, layout=layout))
    pairs = {"out": (got, shard(out, mesh=mesh, layout=layout))}
    for name, mine, all_of_it in zip("qkv", own, one, strict=False):
        pairs[name] = mine.grad, shard(all_of_it.grad, mesh=mesh, layout=layout)
    for name, mine, all_of_it in zip(("gain", "sinks"), own[3:], one[3:], strict=True):
        dist.all_reduce(mine.grad, group=mesh.get_group())
        pairs[name] = mine.grad, all_of_it.grad
    return {name: ((a - b).abs().max() / b.abs().max()).item() for name, (a, b) in pairs.items()}
