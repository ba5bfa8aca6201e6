"""The cost of a sequence that ranks share: bytes, CPU time and memory measured on this machine, and a model of more.

Measured: 1 to 4 gloo processes, forward and backward; bytes are those that a rank hands to the others. Modelled: GPUs
that compute and send as `Assumptions` says.
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch

from tritonattn.cli.options import whole_number
from tritonattn.core.provenance import Environment
from tritonattn.core.tables import table

from .memory import saved_storages
from .options import command_line

METHODS = ("allgather", "alltoall", "ring")
LAYOUTS = ("contiguous", "zigzag")


class Sizes(NamedTuple):
    """A call: batch of one, causal."""

    length: int
    q_heads: int
    kv_heads: int
    head_dim: int
    itemsize: int  # bytes of an element of q, k, v


class Measured(NamedTuple):
    """One rank: bytes sent, bytes that a mode of key lengths adds, CPU seconds, bytes kept for the backward."""

    sent: int
    statistics: int
    seconds: float
    kept: int


class Assumptions(NamedTuple):
    """A GPU of the model, and the layer."""

    tflops: float = 400.0  # bf16, forward and backward
    bandwidth: float = 50e9  # bytes a second a GPU sends
    q_heads: int = 32
    kv_heads: int = 8
    head_dim: int = 128
    memory: float = 8 * 2**30  # bytes that gathered keys and values may take


def sent_by_formula(method: str, ranks: int, sizes: Sizes, grad_itemsize: int = 4) -> float:
    """Bytes that a rank sends in a forward and a backward, statistics aside."""
    tokens = sizes.length // ranks
    keys = tokens * sizes.kv_heads * 2 * sizes.head_dim
    rows = tokens * sizes.q_heads * 2 * sizes.head_dim  # q and the output
    others = ranks - 1
    if method == "alltoall":
        keys *= ranks // math.gcd(ranks, sizes.kv_heads)  # key heads are repeated until the ranks divide them
        return others / ranks * (2 * rows * sizes.itemsize + keys * (sizes.itemsize + grad_itemsize))
    home = ranks if method == "ring" and ranks > 1 else others  # in a ring gradients take one step more
    return 2 * others * keys * sizes.itemsize + home * keys * grad_itemsize


def on_a_rank(rank: int, size: int, method: str, layout: str, sizes: Sizes, rounds: int) -> Measured:
    """Measure one rank of `size`; all processes work, in groups of that size, so that the machine is loaded alike."""
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh

    from tritonattn.distributed import shard

    groups = init_device_mesh("cpu", (dist.get_world_size() // size, size), mesh_dim_names=("group", "rank"))
    mesh = groups["rank"]
    torch.manual_seed(0)
    heads = (sizes.q_heads, sizes.kv_heads, sizes.kv_heads)
    dtype = torch.float32 if sizes.itemsize == 4 else torch.bfloat16
    parts = [
        shard(torch.randn(1, n, sizes.length, sizes.head_dim, dtype=dtype), mesh=mesh, layout=layout) for n in heads
    ]
    sent = {}
    for scaling in ("sqrt_dim", "key_norm_mean"):
        with counted() as bytes_sent:
            kept, _ = _step(parts, mesh, method, layout, scaling)
        sent[scaling] = sum(bytes_sent)
    seconds = min(_step(parts, mesh, method, layout, "sqrt_dim")[1] for _ in range(rounds))
    return Measured(sent["sqrt_dim"], sent["key_norm_mean"] - sent["sqrt_dim"], seconds, kept)


def _step(parts, mesh, method: str, layout: str, scaling: str) -> tuple[int, float]:
    """Bytes kept for the backward, and CPU seconds of this thread in forward and backward."""
    from tritonattn.distributed import context_parallel_attention

    leaves = [x.clone().requires_grad_() for x in parts]
    start = time.thread_time()
    with saved_storages() as storages:
        out = context_parallel_attention(*leaves, mesh=mesh, method=method, layout=layout, scaling=scaling, causal=True)
    for leaf in leaves:
        storages.pop(leaf.untyped_storage().data_ptr(), None)
    out.sum().backward()
    return sum(storages.values()), time.thread_time() - start


@contextmanager
def counted() -> Iterator[list[int]]:
    """The bytes that this rank hands to others in each collective inside."""
    from tritonattn.distributed import collectives

    sent: list[int] = []
    real = {name: getattr(collectives, name) for name in ("all_gather", "all_to_all", "pass_on")}

    def watched(name: str):
        def call(x, split):
            tensors = x if isinstance(x, list) else [x]
            share = {"all_gather": split.size - 1, "all_to_all": (split.size - 1) / split.size, "pass_on": 1}[name]
            sent.extend(int(share * one.numel() * one.element_size()) for one in tensors if split.size > 1)
            return real[name](x, split)

        return call

    try:
        for name in real:
            setattr(collectives, name, watched(name))
        yield sent
    finally:
        for name, function in real.items():
            setattr(collectives, name, function)


def measured_rows(sizes: Sizes, rounds: int) -> list[tuple]:
    from tests.distributed.pool import Pool

    pool, rows = Pool(4), []
    try:
        alone = pool.run(on_a_rank, 1, "allgather", "contiguous", sizes, rounds, seconds=600)
        one = sum(process.seconds for process in alone) / len(alone)
        for size in (2, 4):
            for method in METHODS:
                for layout in LAYOUTS:
                    ranks = pool.run(on_a_rank, size, method, layout, sizes, rounds, seconds=600)
                    sent, formula = max(rank.sent for rank in ranks), sent_by_formula(method, size, sizes)
                    longest = max(rank.seconds for rank in ranks)
                    rows.append(
                        (
                            size,
                            method,
                            layout,
                            f"{sent / 2**20:.2f}",
                            f"{sent / formula:.3f}",
                            f"{max(rank.statistics for rank in ranks) / sent:.3%}",
                            f"{longest:.2f}",
                            f"{longest * size / one:.2f}",
                            f"{max(rank.kept for rank in ranks) / 2**20:.2f}",
                        )
                    )
    finally:
        pool.close()
    return rows


MEASURED = (
    "ranks",
    "method",
    "layout",
    "MiB sent",
    "over formula",
    "statistics",
    "CPU s, longest",
    "x ranks / one",
    "MiB kept",
)


def modelled_rows(lengths: tuple[int, ...], assumed: Assumptions) -> list[tuple]:
    """Communication over compute of one causal layer in bf16, zig-zag, forward and backward, and gathered bytes."""
    rows = []
    for ranks in (8, 64, 256, 1024):
        for length in lengths:
            sizes = Sizes(length, assumed.q_heads, assumed.kv_heads, assumed.head_dim, 2)
            flops = 3.5 * 4 * length**2 * sizes.q_heads * sizes.head_dim / 2 / ranks  # a backward is 2.5 forwards
            compute = flops / (assumed.tflops * 1e12)
            gathered = length * sizes.kv_heads * 2 * sizes.head_dim * sizes.itemsize
            shares = [
                "-" if method == "alltoall" and sizes.q_heads % ranks else f"{send / assumed.bandwidth / compute:.2f}"
                for method in METHODS
                for send in [sent_by_formula(method, ranks, sizes)]
            ]
            by_head = gathered / sizes.kv_heads
            sizes_held = {"allgather": gathered, "by head": by_head, "ring": 0}
            fits = next(name for name, size in sizes_held.items() if size <= assumed.memory)
            rows.append((ranks, f"{length:,}", f"{compute * 1e3:,.1f}", *shares, f"{gathered / 2**30:,.2f}", fits))
    return rows


MODELLED = ("ranks", "tokens", "compute, ms", *(f"{method} / compute" for method in METHODS), "gathered, GiB", "fits")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--length", type=whole_number, default=2048, help="tokens measured; default: %(default)s")
    parser.add_argument("--heads", type=whole_number, default=8, help="query heads, half of them key heads")
    parser.add_argument("--rounds", type=whole_number, default=3, help="the least time counts; default: %(default)s")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> None:
    sizes = Sizes(options.length, options.heads, options.heads // 2, 128, 2)
    where = Environment.of(torch.device("cpu"), command_line("distributed", options))
    print(f"Measured, gloo processes of one thread each: {where}.\n")
    print(f"[1, {sizes.q_heads} over {sizes.kv_heads}, {sizes.length}, {sizes.head_dim}] in bf16, causal, on `sdpa`.")
    print("One process: the same call of one rank, while as many processes run.\n")
    print(table(measured_rows(sizes, options.rounds), MEASURED))
    assumed = Assumptions()
    longest = assumed.memory / (4 * assumed.head_dim)
    print(f"\nModelled, causal, zig-zag, bf16, one layer: {assumed}. Nothing overlaps.")
    print(f"A ring is needed where the keys and values of one head do not fit: from {longest:,.0f} tokens on.\n")
    print(table(modelled_rows((65536, 524288, 8388608), assumed), MODELLED))
