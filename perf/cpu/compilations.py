"""Distinct kernels that ordinary training, decoding and packing compile; nothing is compiled, and no GPU is needed."""

from __future__ import annotations

import argparse
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from tabulate import tabulate
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import make_backend

import tritonattn
from tritonattn.backends.triton import append_keys, launch
from tritonattn.backends.triton.device import binder, compile_options
from tritonattn.core.provenance import Environment
from tritonattn.core.records import FIGURES
from tritonattn.tuning import Target
from tritonattn.tuning.lookup import config_for

from ..options import command_line

SCALINGS = ("sqrt_dim", "key_count", "key_norm_sum")
BFLOAT = torch.bfloat16
Work = Callable[[str], object]  # of a scaling


def _tensor(*shape: int, dtype: torch.dtype = BFLOAT) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def _alike(batch: int = 8, heads: int = 16, length: int = 1024, kv_heads: int | None = None) -> tuple[Tensor, ...]:
    keys = (batch, kv_heads or heads, length, 64)
    return _tensor(batch, heads, length, 64), _tensor(*keys), _tensor(*keys)


def _trained(q: Tensor, k: Tensor, v: Tensor, d_out: Tensor | None = None, **options: Any) -> Work:
    """A causal call and its backward pass."""

    def work(scaling: str) -> None:
        leaves = [x.requires_grad_() for x in (q, k, v)]
        out = tritonattn.attention(*leaves, scaling=scaling, causal=True, backend="triton", **options)
        torch.autograd.grad(out, leaves, torch.empty_like(out) if d_out is None else d_out)

    return work


def _called(q: Tensor, k: Tensor, v: Tensor) -> Work:
    return lambda scaling: tritonattn.attention(q, k, v, scaling=scaling, causal=True, backend="triton")


def _training() -> Iterator[Work]:
    yield from (_trained(*_alike(batch)) for batch in (8, 5, 1))
    lengths = (2048, 2000, 1500, 1000, 1001, 777, 512, 129, 100, 33, 17, 16, 15, 2, 1)
    yield from (_trained(*_alike(length=length)) for length in lengths)
    yield from (_trained(*_alike(heads=heads)) for heads in (12, 1))
    yield from (_trained(*_alike(heads=heads, kv_heads=of)) for heads, of in ((16, 4), (32, 8), (16, 1)))
    yield _trained(*(_tensor(8, 1024, 16, 64).transpose(1, 2) for _ in range(3)))
    for length in (1024, 1001):
        yield _trained(*(x.transpose(1, 2) for x in _tensor(8, length, 3, 16, 64).unbind(2)))
    off_by_one = _tensor(8 * 16 * 1024 * 64 + 1)[1:].view(8, 16, 1024, 64)
    yield _trained(off_by_one, *_alike()[1:])
    yield _trained(*_alike(), d_out=_tensor().expand(8, 16, 1024, 64))
    yield _trained(*_alike(), d_out=_tensor(8, 1024, 16, 64).transpose(1, 2))
    yield from (_trained(*_alike(), window=(left, 0)) for left in (256, 100))
    yield _trained(*_alike(), key_lengths=_tensor(8, dtype=torch.int64))
    yield from (_trained(*_alike(), dropout_p=p) for p in (0.1, 0.2))
    masks = [(1024, 1024), (8, 1, 1024, 1024), (8, 1, 1, 1001), (8, 1, 1, 1008)]
    yield from (_trained(*_alike(length=mask[-1]), mask=_tensor(*mask, dtype=torch.bool)) for mask in masks)
    yield from (_called(*_alike(length=length)) for length in (1024, 1001, 16, 8))
    for length in (1000, 1001, 1008, 1200, 4000, 300, 100):
        yield _called(_tensor(8, 16, 1, 64), *_alike(length=length)[1:])


def _decoded(
    batch: int = 8,
    heads: int = 32,
    kv_heads: int = 8,
    rows: int = 1,
    capacity: int = 4096,
    pages: tuple[int, int, int] | None = None,
    dtype: torch.dtype = torch.int32,
    **options: Any,
) -> Work:
    """A decode step; pages: how many, of how many keys, and how many of them a sequence can have."""
    table = None
    cache = _tensor(batch, kv_heads, capacity, 128)
    if pages is not None:
        count, page, width = pages
        cache, table = _tensor(count, page, kv_heads, 128), _tensor(batch, width, dtype=torch.int32)
    q, lengths = _tensor(batch, heads, rows, 128), _tensor(batch, dtype=dtype)
    return lambda scaling: tritonattn.attention_decode(
        q, cache, cache, key_lengths=lengths, block_table=table, scaling=scaling, backend="triton", **options
    )


def _decoding() -> Iterator[Work]:
    yield from (_decoded(batch=batch) for batch in (8, 1, 3, 64))
    yield from (_decoded(heads=heads, kv_heads=of) for heads, of in ((8, 8), (24, 8), (12, 12)))
    yield from (_decoded(capacity=capacity) for capacity in (4000, 5001, 1000, 300, 65536))
    yield from (_decoded(rows=rows) for rows in (2, 4, 8))
    yield _decoded(dtype=torch.int64)
    yield _decoded(return_aux=True)
    yield _decoded(window=(512, 0))
    pages = ((100, 16, 64), (101, 16, 64), (4096, 16, 64), (100, 64, 64), (100, 48, 64), (100, 16, 65), (100, 16, 1))
    yield from (_decoded(pages=given) for given in pages)


def _packed(tokens: int = 8192, heads: int = 16, sequences: int = 8, longest: int = 2048) -> Work:
    def work(scaling: str) -> None:
        leaves = [_tensor(tokens, heads, 64).requires_grad_() for _ in range(3)]
        starts = _tensor(sequences + 1, dtype=torch.int32)
        out = tritonattn.attention_varlen(
            *leaves, starts, starts, longest, longest, scaling=scaling, causal=True, backend="triton"
        )
        torch.autograd.grad(out, leaves, torch.empty_like(out))

    return work


def _packing() -> Iterator[Work]:
    yield from (_packed(tokens) for tokens in (8192, 8191, 5000))
    yield from (_packed(sequences=count) for count in (1, 39))
    yield from (_packed(longest=longest) for longest in (1000, 2047))
    yield _packed(heads=12)


def _appending() -> Iterator[Work]:
    sums = [_tensor(8, 8, 4098, dtype=torch.float64) for _ in range(2)]
    buffers = (_tensor(8, dtype=torch.int64), _tensor(8, 8, 4097, dtype=torch.float32), *sums)
    buffers = (*buffers, _tensor(8, 8, 4098, dtype=torch.float32))
    for count in (1000, 1, 7, 64, 65, 1001):
        yield lambda _, count=count: append_keys(_tensor(8, 8, count, 128), None, buffers)
    yield lambda _: append_keys(_tensor(8, 8, 5, 128), _tensor(8, dtype=torch.int64), buffers)
    yield lambda _: append_keys(_tensor(8, 1, 8, 128).transpose(1, 2), None, buffers)


LISTS: dict[str, tuple[tuple[str, ...], Callable[[], Iterator[Work]]]] = {
    "training": (SCALINGS, _training),
    "decoding": (SCALINGS, _decoding),
    "packing": (("sqrt_dim", "key_norm_sum"), _packing),
    "appending keys": (("",), _appending),
}


def kernels_of(name: str, target: Target) -> Counter[str]:
    """By kernel, the distinct specialisations that the calls of a list launch on a card of the target."""
    scalings, calls = LISTS[name]
    backend = make_backend(GPUTarget(target.backend, int(target.arch), 32))
    found = set()
    with _of_meta_tensors(), launch.recording(target, config_for) as launches:
        for scaling in scalings:
            for call in calls():
                call(scaling)
    for kernel, _, arguments, config in launches:
        options = compile_options(config, arguments.get("INVARIANT", False))
        _, specialization, _ = binder(kernel, backend)(*arguments.values(), **options)
        found.add((kernel.__name__, *specialization, *options.values()))
    return Counter(kernel for kernel, *_ in found)


@contextmanager
def _of_meta_tensors() -> Iterator[None]:
    """Let the "triton" backend take tensors without memory."""
    before, launch.run = launch.run, lambda *_: None
    try:
        yield
    finally:
        launch.run = before


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--target", default="sm_90", help="architecture whose configs are taken; default: %(default)s")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> None:
    target = Target.parse(options.target)
    rows = []
    for name in LISTS:
        found = kernels_of(name, target)
        kernels = ", ".join(f"{kernel} {count}" for kernel, count in sorted(found.items()))
        rows.append((name, sum(found.values()), kernels))
    print(f"Static: {Environment.of(torch.device('cpu'), command_line('compilations', options))}.\n")
    print(tabulate(rows, ("list", "distinct kernels", "of each"), "github", **FIGURES))
