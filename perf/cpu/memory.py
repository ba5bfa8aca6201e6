"""Bytes that a call keeps for its backward, by form: storages that autograd saves, without q, k and v.

Kernels run on the CPU in Triton's interpreter: TRITON_INTERPRET=1 python -m perf memory
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
import torch.nn.functional as F
from tabulate import tabulate
from torch import Tensor

import tritonattn
from tritonattn.core.records import FIGURES

HEADS, LENGTH = 2, 64
Call = Callable[[Tensor, Tensor, Tensor], Tensor]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--head-dim", type=int, default=128, help="D of q, k and v (default: %(default)s)")
    parser.set_defaults(run=lambda options: print(report(options.head_dim)))


def forms(backend: str) -> dict[str, Call]:
    """Calls by name; all are causal."""

    def ours(**arguments) -> Call:
        return lambda q, k, v: tritonattn.attention(q, k, v, causal=True, backend=backend, **arguments)

    learned = tritonattn.nn.SSMax(HEADS, base=LENGTH)
    return {
        "`sqrt_dim`": ours(),
        "`key_count`, `log_key_count` and others of n": ours(scaling="key_count"),
        "learned: `SSMax`": ours(scaling=learned),
        "`key_norm_mean` and others of key norms": ours(scaling="key_norm_mean"),
        "`cosine`": ours(scaling="cosine"),
        "`sqrt_dim`, softcap, sinks, dropout": ours(softcap=20.0, sinks=torch.zeros(HEADS), dropout_p=0.1),
    }


def kept_bytes(call: Call, dtype: torch.dtype, head_dim: int) -> float:
    """Bytes kept for the backward of a call, for each token of each head, without q, k and v."""
    q, k, v = (torch.randn(1, HEADS, LENGTH, head_dim).to(dtype).requires_grad_() for _ in range(3))
    with saved_storages() as storages:
        out = call(q, k, v)
    assert out.requires_grad
    for leaf in (q, k, v):
        storages.pop(leaf.untyped_storage().data_ptr(), None)
    return sum(storages.values()) / (HEADS * LENGTH)


@contextmanager
def saved_storages() -> Iterator[dict[int, int]]:
    """Bytes of the storages that autograd saves inside, by address; each is held until the end, and counted once."""
    storages: dict[int, int] = {}
    held = []

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        storages[storage.data_ptr()] = storage.nbytes()
        held.append(storage)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        yield storages
    held.clear()


def reset_peak() -> int:
    """Restart the count of this process's peak, which importing has raised, and return the bytes now resident."""
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    return resident("VmRSS")


def resident(field: str) -> int:
    """Bytes of this process: now resident (VmRSS), or at the peak since `reset_peak` (VmHWM)."""
    status = Path("/proc/self/status").read_text(encoding="utf-8")
    line = next(line for line in status.splitlines() if line.startswith(f"{field}:"))
    return int(line.split()[1]) * 1024


def flash_attention_bytes(dtype: torch.dtype, head_dim: int) -> float:
    """flash-attn's formula: the output, and lse in fp32 (Dao 2023, arXiv:2307.08691, section 3.1.2)."""
    return head_dim * dtype.itemsize + 4


def rows(head_dim: int) -> list[list[str]]:
    """Form, and bytes for each token of each head: on `triton` in bf16, on `sdpa` in fp32 and in bf16."""
    cases = [("triton", torch.bfloat16), ("sdpa", torch.float32), ("sdpa", torch.bfloat16)]
    found = [
        [form, *(f"{kept_bytes(forms(backend)[form], dtype, head_dim):,.0f}" for backend, dtype in cases)]
        for form in forms("triton")
    ]

    def plain(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v, is_causal=True)

    of_torch = [f"{kept_bytes(plain, dtype, head_dim):,.0f}" for dtype in (torch.float32, torch.bfloat16)]
    flash = f"{flash_attention_bytes(torch.bfloat16, head_dim):,.0f}"
    return [*found, ["`F.scaled_dot_product_attention` on a CPU", "-", *of_torch], ["flash-attn", flash, "-", "-"]]


def report(head_dim: int) -> str:
    return tabulate(rows(head_dim), ("form", "`triton`, bf16", "`sdpa`, fp32", "`sdpa`, bf16"), "github", **FIGURES)
