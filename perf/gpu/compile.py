"""Compile the kernels of the soak and of the sweeps by all cores, into Triton's cache, before anything is timed.

Calls are made on CPU tensors, as on the machine's GPU; their launches are compiled and not run. A launch that comes
later with arguments of the same types and alignments finds the code.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor
from itertools import islice
from multiprocessing import get_context
from typing import Any

import torch

import tritonattn
from tritonattn.backends.triton import launch
from tritonattn.backends.triton.compile import compile_launch
from tritonattn.cli.options import whole_number
from tritonattn.cli.threads import usable_cores
from tritonattn.tuning.config import Target

from ..devices import obstacle
from ..soak.draw import ON_A_GPU, draw
from ..soak.guards import CONFIGS
from ..sweep.suites import DIMS

_SEEDS = 1024  # of the soak, of which those in a row share code
_COMMON = ("sqrt_dim", "key_norm_mean")

# A call, and the function that chooses its configs.
Call = tuple[Callable[[], object], launch.ConfigFor]


def calls() -> Iterator[Call]:
    """The soak's and the sweeps', in an order in which each kernel comes early."""
    yield from _of_sweeps()
    for seed in range(0, _SEEDS, ON_A_GPU.variations):
        trial = draw(seed, torch.device("cpu"), ON_A_GPU)
        yield lambda trial=trial: trial.results("triton", trial.leaves), CONFIGS[trial.stages]


def _of_sweeps() -> Iterator[Call]:
    """Forward alone and with its backward, at lengths of short and long configs; steps of decoding."""
    for head_dim, causal, scaling in _cases():
        for length in (512, 2048):
            yield lambda a=(length, head_dim, causal, scaling): _dense(*a), launch.config_for
    for scaling in _COMMON:
        yield lambda scaling=scaling: _decode(scaling), launch.config_for


def _cases() -> Iterator[tuple[int, bool, str]]:
    for head_dim in (64, 128):
        yield from ((head_dim, causal, scaling) for causal in (False, True) for scaling in _COMMON)
    yield from ((head_dim, causal, _COMMON[1]) for head_dim in DIMS for causal in (False, True))
    yield from ((64, True, scaling) for scaling in tritonattn.SCALINGS if scaling not in _COMMON)


def _dense(length: int, head_dim: int, causal: bool, scaling: str) -> None:
    leaves = [torch.zeros(1, 2, length, head_dim, dtype=torch.bfloat16, requires_grad=True) for _ in range(3)]
    options: dict[str, Any] = {"causal": causal, "scaling": scaling, "backend": "triton"}
    with torch.no_grad():
        tritonattn.attention(*leaves, **options)
    out = tritonattn.attention(*leaves, **options)
    torch.autograd.grad(out, leaves, torch.ones_like(out))


def _decode(scaling: str) -> None:
    q, lengths = torch.zeros(2, 8, 1, 128, dtype=torch.bfloat16), torch.tensor([1000, 2000])
    k = torch.zeros(2, 2, 4096, 128, dtype=torch.bfloat16)
    pages, table = torch.zeros(512, 16, 2, 128, dtype=torch.bfloat16), torch.arange(512, dtype=torch.int32).view(2, 256)
    statistics = tritonattn.KeyStatistics(2, 2, 4096)
    statistics.append(k[:, :, :2000])
    for options in ({}, {"statistics": statistics}):
        tritonattn.attention_decode(q, k, k, key_lengths=lengths, scaling=scaling, backend="triton", **options)
        tritonattn.attention_decode(
            q, pages, pages, key_lengths=lengths, block_table=table, scaling=scaling, backend="triton", **options
        )


def compiled(target: Target, first: int, of: int, seconds: float, most: int | None = None) -> tuple[int, list[str]]:
    """Compile the kernels of every `of`-th call from `first` on: how many, and the errors of calls.

    seconds   after which no call begins;  most: calls
    """
    done: set[str] = set()

    def compile_it(kernel: Any, grid: launch.Grid, arguments: Mapping[str, Any], config: Any) -> None:
        if "argmax_ptr" in arguments:  # positions of keys, which torch will take
            arguments["argmax_ptr"].zero_()
        done.add(compile_launch(launch.Launch(kernel, grid, arguments, config), target).hash)

    launch.run, end, errors = compile_it, time.monotonic() + seconds, []
    Target.of = classmethod(lambda cls, device: target)  # this process does nothing else
    for call, config_for in islice(calls(), first, most, of):
        if time.monotonic() > end:
            break
        launch.config_for = config_for
        try:
            call()
        except Exception as error:
            errors.append(f"{type(error).__name__}: {str(error).strip()[:200]}")
    return len(done), errors


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--target", help="sm_90, gfx942, ...; default: that of the GPU")
    parser.add_argument("--minutes", type=float, default=10.0, help="begin no call after so long")
    parser.add_argument("--calls", type=whole_number, help="compile for the first calls alone")
    parser.add_argument("--processes", type=whole_number, default=usable_cores())
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> None:
    """Compile, and say how many kernels and how long; exit with an error where a call raised one."""
    if options.target is None and (reason := obstacle("cuda")):
        sys.exit(f"compile: {reason}; --target compiles for a card that is not here")
    target = Target.parse(options.target) if options.target else Target.of(torch.device("cuda"))
    start, count = time.monotonic(), options.processes
    with ProcessPoolExecutor(count, get_context("spawn")) as pool:
        tasks = [pool.submit(compiled, target, n, count, 60 * options.minutes, options.calls) for n in range(count)]
        found = [task.result() for task in tasks]
    print(f"{sum(number for number, _ in found)} kernels in {time.monotonic() - start:.0f} s by {count} processes")
    if errors := [error for _, some in found for error in some]:
        sys.exit("\n".join([f"compile: {len(errors)} calls raised", *errors[:10]]))
