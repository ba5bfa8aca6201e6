"""The cost of a sequence that ranks share: bytes, CPU time and memory measured on this machine, and a model of more.

Measured: 1 to 4 gloo processes, forward and backward; bytes are those that a rank hands to the others. Modelled: GPUs
that compute and send as `Assumptions` says; peaks of memory, by counted bytes, which are held to measured ones.
"""

from __future__ import annotations

import argparse
import ctypes
import math
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from itertools import product
from typing import Any, NamedTuple

import torch
from tabulate import tabulate

from tritonattn.cli.options import whole_number
from tritonattn.core.provenance import Environment
from tritonattn.core.records import FIGURES

from ..options import command_line
from .memory import reset_peak, resident, saved_storages

METHODS = ("allgather", "alltoall", "ring")
LAYOUTS = ("contiguous", "zigzag")
FORMS = ("allgather", "by head", "alltoall", "ring")  # "by head": allgather with head_group=1


class Sizes(NamedTuple):
    """A call: batch of one, causal."""

    length: int
    q_heads: int
    kv_heads: int
    head_dim: int
    itemsize: int  # bytes of an element of q, k, v


class Measured(NamedTuple):
    """One rank: bytes sent, bytes that a mode of key norms adds, CPU seconds, bytes kept for the backward."""

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
    memory: float = 8 * 2**30  # bytes that the call may take at its peak


def _repeats(ranks: int, sizes: Sizes) -> int:
    """The number of times that "alltoall" repeats a key head, until the ranks divide them."""
    return ranks // math.gcd(ranks, sizes.kv_heads)


def sent_by_formula(method: str, ranks: int, sizes: Sizes, grad_itemsize: int = 4) -> float:
    """Bytes that a rank sends in a forward and a backward, statistics aside."""
    tokens = sizes.length // ranks
    keys = tokens * sizes.kv_heads * 2 * sizes.head_dim
    rows = tokens * sizes.q_heads * 2 * sizes.head_dim  # q and the output
    others = ranks - 1
    if method == "alltoall":
        keys *= _repeats(ranks, sizes)
        return others / ranks * (2 * rows * sizes.itemsize + keys * (sizes.itemsize + grad_itemsize))
    home = ranks if method == "ring" and ranks > 1 else others  # in a ring gradients take one step more
    return 2 * others * keys * sizes.itemsize + home * keys * grad_itemsize


def peak_by_formula(form: str, ranks: int, sizes: Sizes) -> float:
    """Bytes of a rank at the peak, in the backward, without q, k, v: in 16 bits, zig-zag, gradients added in fp32."""
    rows, keys = (sizes.length // ranks * heads * sizes.head_dim for heads in (sizes.q_heads, sizes.kv_heads))
    kept_and_found = rows * (4 + 2 + 1) + keys * 4  # kept: q and k in fp32, the output and what rounding took of it
    kept_and_found += rows * (4 + 4) + keys * (4 + 2)  # gradients; and those of q from the operator
    operands, gradients = 4 + 2, 4 + 2  # k in fp32 and v; what the operator returns for them
    exchanged = 3 * 4  # one gradient chunk by chunk, one rank by rank, and what other ranks sent
    if form == "ring":  # parts held and on their way, and k in fp32; gradients held, sent, on their way, and their sum
        return kept_and_found + keys * (2 * (2 + 2) + 4 + gradients + 4 * (4 + 4))
    if form == "alltoall":
        return kept_and_found + keys * _repeats(ranks, sizes) * (operands + gradients + exchanged)
    gathered = ranks * keys / (sizes.kv_heads if form == "by head" else 1)
    return kept_and_found + gathered * (operands + (4 + 4) + gradients + exchanged)


def on_a_rank(rank: int, size: int, method: str, layout: str, sizes: Sizes, rounds: int) -> Measured:
    """Measure one rank of `size`; all processes work, in groups of that size, so that the machine is loaded alike."""
    mesh, parts = _mesh(size), _parts(size, sizes)
    sent = {}
    for scaling in ("sqrt_dim", "key_norm_mean"):
        with counted() as bytes_sent:
            kept, _ = _step(parts, mesh, method, layout, scaling)
        sent[scaling] = sum(bytes_sent)
    seconds = min(_step(parts, mesh, method, layout, "sqrt_dim")[1] for _ in range(rounds))
    return Measured(sent["sqrt_dim"], sent["key_norm_mean"] - sent["sqrt_dim"], seconds, kept)


def peak_of_a_rank(rank: int, size: int, form: str, sizes: Sizes) -> int:
    """Bytes that a forward and a backward add to this process at their peak, zig-zag, after a short call."""
    ctypes.CDLL(None).mallopt(-3, 2**16)  # M_MMAP_THRESHOLD: what is freed goes back to the system
    mesh = _mesh(size)
    method, options = ("allgather", {"head_group": 1}) if form == "by head" else (form, {})
    _step(_parts(size, sizes._replace(length=32 * size)), mesh, method, "zigzag", "sqrt_dim", **options)
    parts = _parts(size, sizes)
    before = reset_peak() + sum(x.nbytes for x in parts)  # `_step` copies them
    _step(parts, mesh, method, "zigzag", "sqrt_dim", **options)
    return resident("VmHWM") - before


def _mesh(size: int) -> Any:
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh

    shape = (dist.get_world_size() // size, size)
    return init_device_mesh("cpu", shape, mesh_dim_names=("group", "rank"))["rank"]


def _parts(size: int, sizes: Sizes) -> list[torch.Tensor]:
    """q, k and v of one of `size` ranks; it matters to nobody what they hold."""
    dtype = torch.float32 if sizes.itemsize == 4 else torch.bfloat16
    shape = (sizes.length // size, sizes.head_dim)
    return [torch.randn(1, heads, *shape, dtype=dtype) for heads in (sizes.q_heads, sizes.kv_heads, sizes.kv_heads)]


def _step(parts, mesh, method: str, layout: str, scaling: str, **options: Any) -> tuple[int, float]:
    """Bytes kept for the backward, and CPU seconds of this thread in forward and backward."""
    from tritonattn.distributed import context_parallel_attention

    leaves = [x.clone().requires_grad_() for x in parts]
    start = time.thread_time()
    with saved_storages() as storages:
        how = {"method": method, "layout": layout, "scaling": scaling, "causal": True, **options}
        out = context_parallel_attention(*leaves, mesh=mesh, **how)
    for leaf in leaves:
        storages.pop(leaf.untyped_storage().data_ptr(), None)
    out.sum().backward()
    return sum(storages.values()), time.thread_time() - start


@contextmanager
def counted() -> Iterator[list[int]]:
    """The bytes that this rank hands to others in each collective inside, but for the comparison of new calls."""
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

    rows = []
    with closing(Pool(4)) as pool:
        alone = pool.run(on_a_rank, 1, "allgather", "contiguous", sizes, rounds, seconds=600)
        one = sum(process.seconds for process in alone) / len(alone)
        for size, method, layout in product((2, 4), METHODS, LAYOUTS):
            ranks = pool.run(on_a_rank, size, method, layout, sizes, rounds, seconds=600)
            sent, formula = max(rank.sent for rank in ranks), sent_by_formula(method, size, sizes)
            longest = max(rank.seconds for rank in ranks)
            figures = (
                f"{sent / 2**20:.2f}",
                f"{sent / formula:.3f}",
                f"{max(rank.statistics for rank in ranks) / sent:.3%}",
                f"{longest:.2f}",
                f"{longest * size / one:.2f}",
                f"{max(rank.kept for rank in ranks) / 2**20:.2f}",
            )
            rows.append((size, method, layout, *figures))
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


def peak_rows(sizes: Sizes) -> list[tuple]:
    from tests.distributed.pool import Pool

    rows = []
    with closing(Pool(4)) as pool:
        for size, form in product((2, 4), FORMS):
            peak = max(pool.run(peak_of_a_rank, size, form, sizes, seconds=600))
            formula = peak_by_formula(form, size, sizes)
            rows.append((size, form, f"{peak / 2**20:.1f}", f"{formula / 2**20:.1f}", f"{peak / formula:.2f}"))
    return rows


PEAKS = ("ranks", "method", "peak MiB", "by formula", "measured / formula")


def modelled_rows(lengths: tuple[int, ...], assumed: Assumptions) -> list[tuple]:
    """Communication over compute of one causal layer in bf16, zig-zag, forward and backward, and peaks of memory."""
    rows = []
    for ranks in (8, 64, 256, 1024):
        for length in lengths:
            sizes = Sizes(length, assumed.q_heads, assumed.kv_heads, assumed.head_dim, 2)
            flops = 3.5 * 4 * length**2 * sizes.q_heads * sizes.head_dim / 2 / ranks  # a backward is 2.5 forwards
            compute = flops / (assumed.tflops * 1e12)
            is_possible = {form: form != "alltoall" or sizes.q_heads % ranks == 0 for form in FORMS}
            shares = [
                f"{sent_by_formula(method, ranks, sizes) / assumed.bandwidth / compute:.2f}"
                if is_possible[method]
                else "-"
                for method in METHODS
            ]
            peaks = {form: peak_by_formula(form, ranks, sizes) for form in FORMS if is_possible[form]}
            fits = next((form for form, peak in peaks.items() if peak <= assumed.memory), "none")
            held = (f"{peaks[form] / 2**30:,.2f}" if form in peaks else "-" for form in FORMS)
            rows.append((ranks, f"{length:,}", f"{compute * 1e3:,.1f}", *shares, *held, fits))
    return rows


MODELLED = (
    "ranks",
    "tokens",
    "compute, ms",
    *(f"{method} / compute" for method in METHODS),
    *(f"{form}, GiB" for form in FORMS),
    "fits",
)


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
    print(tabulate(measured_rows(sizes, options.rounds), MEASURED, "github", **FIGURES))
    print("\nMeasured, peak of resident memory in a forward and a backward of a rank, zig-zag, without q, k and v:\n")
    print(tabulate(peak_rows(sizes), PEAKS, "github", **FIGURES))
    assumed = Assumptions()
    print(f"\nModelled, causal, zig-zag, bf16, one layer: {assumed}. Nothing overlaps.")
    print("GiB: the peak of a rank's memory in the backward, without q, k and v, by the formula of the table before.\n")
    print(tabulate(modelled_rows((65536, 524288, 8388608), assumed), MODELLED, "github", **FIGURES))
