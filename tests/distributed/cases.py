"""Functions that run on every rank: a call over ranks against the same call in one process."""

import os
from copy import deepcopy
from itertools import pairwise
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

import tritonattn
from tritonattn.distributed import context_parallel_attention, context_parallel_decode, shard, unshard

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
        pairs = [(a, b) for a, b in pairwise(offsets) for _ in range(b - a)]
        mask["key_ranges"] = torch.tensor(pairs).expand(batch, -1, -1)
    return mask


def operands(dtype: torch.dtype, length: int = LENGTH) -> list[torch.Tensor]:
    """q, k, v and the output's gradient of the whole sequence, the same on every rank."""
    torch.manual_seed(0)
    shapes = ((HEADS, DIM), (KV_HEADS, DIM), (KV_HEADS, DIM + 4), (HEADS, DIM + 4))
    return [torch.randn(2, heads, length, dim, dtype=torch.float64).to(dtype) for heads, dim in shapes]


def leaves(*tensors: torch.Tensor) -> list[torch.Tensor]:
    return [x.detach().clone().requires_grad_() for x in tensors]


def errors(
    rank: int, size: int, method: str, layout: str, mask: str, scaling: Any, options: dict[str, Any]
) -> dict[str, float]:
    """Errors of output and gradients, each relative to the largest value, on this rank; one process is fp64."""
    mesh, options = mesh_of(size), dict(options)
    dtype, head_group = options.pop("dtype", torch.float64), options.pop("head_group", None)
    *whole, d_out = operands(dtype)
    rows = torch.rand(HEADS, 1, dtype=torch.float64) + 0.5, torch.randn(HEADS, dtype=torch.float64)
    bias = torch.randn(KV_HEADS, LENGTH, dtype=torch.float64)
    mode, learned = deepcopy(scaling), deepcopy(scaling)
    *one, gain, sinks, one_bias = leaves(*(x.double() for x in whole), *rows, bias)
    learnable = {"scaling": mode, "gain": gain, "sinks": sinks, "key_bias": one_bias}
    out = tritonattn.attention(*one, **learnable, **in_one_process(MASKS[mask], 2), **options)
    out.backward(d_out.double())
    given = dict(MASKS[mask])
    if "cu_seqlens" in given:
        given["cu_seqlens"] = torch.tensor(given["cu_seqlens"], dtype=torch.int32)
    wide = torch.promote_types(dtype, torch.float32)
    *own, own_gain, own_sinks, own_bias = leaves(
        *(shard(x, mesh=mesh, layout=layout) for x in whole),
        *(x.to(wide) for x in rows),
        shard(bias.to(wide), mesh=mesh, layout=layout, dim=1),
    )
    got = context_parallel_attention(
        *own,
        mesh=mesh,
        method=method,
        layout=layout,
        scaling=learned,
        gain=own_gain,
        sinks=own_sinks,
        key_bias=own_bias,
        head_group=head_group,
        **given,
        **options,
    )
    got.backward(shard(d_out, mesh=mesh, layout=layout))
    pairs = {"out": (got, shard(out, mesh=mesh, layout=layout))}
    for name, mine, all_of_it in zip("qkv", own, one, strict=True):
        pairs[name] = mine.grad, shard(all_of_it.grad, mesh=mesh, layout=layout)
    pairs["key_bias"] = own_bias.grad, shard(one_bias.grad, mesh=mesh, layout=layout, dim=1)
    parameters = [("gain", own_gain, gain), ("sinks", own_sinks, sinks)]
    if isinstance(mode, torch.nn.Module):
        parameters += [
            (name, mine, one) for (name, mine), one in zip(learned.named_parameters(), mode.parameters(), strict=True)
        ]
    for name, mine, all_of_it in parameters:
        dist.all_reduce(mine.grad, group=mesh.get_group())
        pairs[name] = mine.grad, all_of_it.grad
    return {name: ((a.double() - b).abs().max() / b.abs().max()).item() for name, (a, b) in pairs.items()}


def aux_and_repetition(rank: int, method: str) -> tuple[dict[str, float], bool]:
    """Errors of `AttentionAux` in fp32, and whether a second call gives the same bits, gradients included."""
    mesh = mesh_of(dist.get_world_size())
    *whole, d_out = operands(torch.float32)
    options = {"scaling": "key_norm_sum", "gain": 9.0, "causal": True, "softcap": 2.0, "return_aux": True}
    _, wanted = tritonattn.attention(*(x.double() for x in whole), **options)
    bits = []
    for _ in range(2):
        own = leaves(*(shard(x, mesh=mesh, layout="zigzag") for x in whole))
        out, aux = context_parallel_attention(*own, mesh=mesh, method=method, layout="zigzag", **options)
        (out * shard(d_out, mesh=mesh, layout="zigzag") + aux.lse[..., None]).sum().backward()
        bits.append([out, *aux, *(x.grad for x in own)])
    parts = {name: shard(x, mesh=mesh, layout="zigzag") for name, x in wanted._asdict().items()}
    off = {name: (getattr(aux, name) - x).abs().max().item() for name, x in parts.items()}
    return off, all(torch.equal(a, b) for a, b in zip(*bits, strict=True))


def compiled(rank: int, method: str) -> list[float]:
    """Differences of a compiled call, fullgraph, from the same call: output and gradients."""
    mesh = mesh_of(dist.get_world_size())
    parts = [shard(x, mesh=mesh) for x in operands(torch.float32)[:3]]

    def call(q, k, v):
        return context_parallel_attention(q, k, v, mesh=mesh, method=method, causal=True, scaling="key_norm_mean")

    results = []
    for run in (call, torch.compile(call, backend="aot_eager", fullgraph=True)):
        own = leaves(*parts)
        out = run(*own)
        out.square().sum().backward()
        results.append([out, *(x.grad for x in own)])
    return [(a - b).abs().max().item() for a, b in zip(*results, strict=True)]


def round_trip(rank: int) -> str:
    mesh, x = mesh_of(dist.get_world_size()), torch.arange(48.0).view(2, 1, 24)
    for layout in ("contiguous", "zigzag"):
        part = shard(x, mesh=mesh, layout=layout).requires_grad_()
        whole = unshard(part, mesh=mesh, layout=layout)
        assert torch.equal(whole, x)
        (whole * x).sum().backward()
        assert torch.equal(part.grad, 4 * part)  # from four ranks
    try:
        shard(x[..., :12], mesh=mesh, layout="zigzag")
    except ValueError as error:
        return str(error)
    return "no error"


def refused(rank: int) -> list[str]:
    """Messages of calls that every rank refuses before it sends anything."""
    mesh, messages = mesh_of(dist.get_world_size()), []
    q, k, v = (shard(x, mesh=mesh) for x in operands(torch.float32)[:3])
    for call in (
        lambda: context_parallel_attention(q, k, v, mesh=mesh, cu_seqlens=torch.tensor([0, 9, 3]).int()),
        lambda: context_parallel_attention(q, k, v, mesh=mesh, cu_seqlens=torch.tensor([0, 999]).int()),
        lambda: context_parallel_decode(None, k, v, mesh=mesh, key_lengths=torch.tensor([1])),
        lambda: context_parallel_decode(q[:, :, :1], k[0], v, mesh=mesh, key_lengths=torch.tensor([1])),
    ):
        try:
            messages.append(str(call()))
        except (TypeError, ValueError) as error:
            messages.append(str(error))
    return messages


def with_a_fault(rank: int, fault: str, method: str) -> None:
    """Rank 1 dies, or has another shape, while the others attend."""
    mesh = mesh_of(dist.get_world_size())
    q, k, v = (shard(x, mesh=mesh) for x in operands(torch.float32)[:3])
    if rank == 1 and fault == "dies":
        os._exit(1)
    if rank == 1 and fault == "other shape":
        q, k, v = (x[:, :, :4] for x in (q, k, v))
    context_parallel_attention(q, k, v, mesh=mesh, method=method)
    raise RuntimeError("attended in spite of the fault")


def decode(rank: int, scaling: str, q_len: int, window: Any, has_statistics: bool, dtype: torch.dtype) -> float:
    """Largest error of outputs and statistics of rows: sequences of 0 to all keys, the rest of the cache NaN."""
    ranks, capacity = dist.get_world_size(), 8
    torch.manual_seed(0)
    lengths = torch.tensor([0, 3, 9, 22, ranks * capacity])
    q = torch.randn(5, HEADS, q_len, DIM, dtype=torch.float64).to(dtype)
    k, v = torch.randn(2, 5, KV_HEADS, ranks * capacity, DIM, dtype=torch.float64).to(dtype)
    hidden = torch.arange(ranks * capacity) >= lengths[:, None, None, None]
    k, v = (x.masked_fill(hidden.mT, torch.nan) for x in (k, v))
    options = {
        "scaling": scaling,
        "gain": 3.0,
        "window": window,
        "softcap": 4.0,
        "sinks": torch.linspace(-1, 2, HEADS),
        "key_lengths": lengths.to(torch.uint8),
        "return_aux": True,
    }
    wanted, expected = tritonattn.attention_decode(q.double(), k.double(), v.double(), **options)
    own = slice(rank * capacity, (rank + 1) * capacity)
    k, v, statistics = k[:, :, own], v[:, :, own], None
    if has_statistics:
        statistics = tritonattn.KeyStatistics(5, KV_HEADS, capacity)
        statistics.append(k.nan_to_num(), counts=(lengths - own.start).clamp(0, capacity))
    mesh = mesh_of(ranks)
    got, aux = context_parallel_decode(q, k, v, mesh=mesh, statistics=statistics, **options)
    for x, y in zip((got, *aux), (wanted, *expected), strict=True):
        assert torch.equal(x == -torch.inf, y == -torch.inf)
    pairs = [(x.double() - y).nan_to_num(0, 0, 0) for x, y in zip((got, *aux), (wanted, *expected), strict=True)]
    assert not any(x.isnan().any() for x in (got, *aux))
    return max(x.abs().max().item() for x in pairs)
