"""Time and memory of forward + backward on a CPU, against PyTorch's attention; on Linux."""

from __future__ import annotations

import argparse
import multiprocessing
import statistics
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from pathlib import Path

import torch
from tabulate import tabulate
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

import tritonattn
from tritonattn.autotune.timing import Contestant, median_ratio, take_turns
from tritonattn.cli.options import check_file, whole_number
from tritonattn.core.provenance import Environment
from tritonattn.core.records import FIGURES, write_json
from tritonattn.core.visibility import Visibility

from ..cases.recipes import scaled_by_mode
from ..options import command_line
from .memory import reset_peak, resident

HEADS, HEAD_DIM = 8, 64
Attend = Callable[[Tensor, Tensor, Tensor], Tensor]


def packed(length: int) -> Tensor:
    """Return the key ranges of eight documents in a row; `causal=True` adds the rest of the mask."""
    document = max(1, length // 8)
    start = torch.arange(length) // document * document
    return torch.stack([start, start + document], dim=-1)[None].int()


def cases(length: int) -> dict[str, dict[str, Attend]]:
    """List the contestants by mask; the first of each is the baseline."""
    masks = {
        "causal, window 512": {"causal": True, "window": (512, None)},
        "causal, 3/4 of the keys": {"causal": True, "key_lengths": torch.tensor([length * 3 // 4])},
        "8 packed documents": {"causal": True, "key_ranges": packed(length)},
    }
    compared: dict[str, dict[str, Attend]] = {
        "causal": {
            "F.sdpa(is_causal=True)": partial(scaled_dot_product_attention, is_causal=True),
            **{
                f"tritonattn {scaling}": partial(tritonattn.attention, scaling=scaling, causal=True)
                for scaling in ("sqrt_dim", "key_count", "key_norm_sum")
            },
        }
    }
    for scaling in tritonattn.SCALINGS:
        compared[f"causal, {scaling}"] = {
            "q multiplied by hand, F.sdpa": partial(_by_hand, scaling),
            f"tritonattn {scaling}": partial(tritonattn.attention, scaling=scaling, causal=True),
        }
    for name, mask in masks.items():
        compared[name] = {
            "F.sdpa(attn_mask=...)": partial(_masked, mask),
            "tritonattn sqrt_dim": partial(tritonattn.attention, **mask),
            "tritonattn key_norm_sum": partial(tritonattn.attention, scaling="key_norm_sum", **mask),
        }
    for name, derived in {"jvp": _tangent, "gradient": _gradient}.items():
        compared[f"causal, {name} and its gradient"] = {
            "F.sdpa, its math path": partial(derived, _math),
            "tritonattn sqrt_dim": partial(derived, partial(tritonattn.attention, causal=True)),
            "tritonattn cosine": partial(derived, partial(tritonattn.attention, scaling="cosine", causal=True)),
        }
    return compared


def _by_hand(scaling: str, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Causal attention with the mode's scales multiplied into q, and for cosine into k, before F.sdpa."""
    q, k = scaled_by_mode(scaling, q, k, causal=True)
    return scaled_dot_product_attention(q, k, v, is_causal=True, scale=1.0)


def _masked(mask: dict, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return scaled_dot_product_attention(q, k, v, attn_mask=Visibility.of(q, k, **mask).dense())


def _math(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Causal attention by the one way of PyTorch's that has tangents and second gradients."""
    with sdpa_kernel(SDPBackend.MATH):
        return scaled_dot_product_attention(q, k, v, is_causal=True)


def _tangent(attend: Attend, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return torch.func.jvp(attend, (q, k, v), (v.detach(), q.detach(), k.detach()))[1]


def _gradient(attend: Attend, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """The sum of the gradients of q, k and v, as a function of them."""
    d_q, d_k, d_v = torch.autograd.grad(attend(q, k, v), (q, k, v), q.detach(), create_graph=True)
    return d_q + d_k + d_v


def inputs(length: int) -> list[Tensor]:
    """Draw q, k, v and the gradient of out: fp32 [1, 8, length, 64]."""
    random = torch.Generator().manual_seed(0)
    q, k, v, d_out = (torch.randn(1, HEADS, length, HEAD_DIM, generator=random) for _ in range(4))
    return [q.requires_grad_(), k.requires_grad_(), v.requires_grad_(), d_out]


def forward_backward(attend: Attend, tensors: list[Tensor]) -> None:
    *leaves, d_out = tensors
    for leaf in leaves:
        leaf.grad = None
    attend(*leaves).backward(d_out)


def times(compared: dict[str, Attend], length: int, repeats: int) -> dict[str, list[float]]:
    """Time every contestant in every round, in milliseconds."""
    tensors = inputs(length)

    def contestant(attend: Attend) -> Contestant:
        return lambda number: forward_backward(attend, tensors)

    contestants = {name: contestant(attend) for name, attend in compared.items()}
    return take_turns(contestants, torch.device("cpu"), repeats)


def peak_memory(case: str, name: str, length: int, threads: int) -> int:
    """Measure the bytes that one forward and backward, inputs included, add to a fresh process after a warm-up."""
    context = multiprocessing.get_context("spawn")
    with context.Pool(1) as pool:
        return pool.apply(_peak_memory, (case, name, length, threads))


def _peak_memory(case: str, name: str, length: int, threads: int) -> int:
    torch.set_num_threads(threads)
    forward_backward(cases(64)[case][name], inputs(64))
    attend = cases(length)[case][name]
    before = reset_peak()
    forward_backward(attend, inputs(length))
    return resident("VmHWM") - before


def measure(options: argparse.Namespace) -> list[dict]:
    """Measure times and memory; one record a contestant."""
    records = []
    for case, compared in cases(options.length).items():
        if options.case not in (None, case):
            continue
        taken = times(compared, options.length, options.repeats)
        memory = {name: peak_memory(case, name, options.length, options.threads) for name in compared}
        baseline = next(iter(compared))
        for name in compared:
            records.append(
                {
                    "case": case,
                    "attention": name,
                    "median_ms": statistics.median(taken[name]),
                    "time_ratio": median_ratio(taken[name], taken[baseline]),
                    "peak_mib": memory[name] / 2**20,
                    "memory_ratio": memory[name] / memory[baseline],
                }
            )
    return records


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--repeats", type=whole_number, default=15, help="rounds, in which all take turns")
    parser.add_argument("--length", type=whole_number, default=4096, help="queries and keys")
    parser.add_argument("--threads", type=whole_number, default=2)
    parser.add_argument(
        "--case", choices=list(cases(64)), metavar="CASE", help="measure this one alone, as the table names it"
    )
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> None:
    """Measure, print the table and write the file."""
    check_file("--json", options.json)
    torch.set_num_threads(options.threads)
    environment = Environment.of(torch.device("cpu"), command_line("cpu", options))
    records = measure(options)
    print(f"Measured: {environment}")
    print(f"[1, {HEADS}, {options.length}, {HEAD_DIM}] float32, forward + backward; ratios to the first of each case,")
    print(f"medians of {options.repeats} interleaved rounds\n")
    headers = ["case", "attention", "ms", "time ratio", "peak MiB", "memory ratio"]
    digits = ("", "", ".0f", ".3f", ".0f", ".2f")
    rows = [[format(x, one) for x, one in zip(record.values(), digits, strict=True)] for record in records]
    print(tabulate(rows, headers, "simple", **FIGURES | {"colalign": ("left",) * 2}))
    if options.json:
        write_json(options.json, {"environment": asdict(environment), "results": records})
