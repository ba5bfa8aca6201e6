"""The host's time, launches and torch operators in small calls on a GPU, without one: on a stub of NVIDIA's driver.

A time is CPU time from the call of our function to the call of the driver. Tensors lie on the CPU, so that the time of
launches by torch, of its allocator and of the driver is missing.
"""

from __future__ import annotations

import argparse
import gc
import statistics
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from tabulate import tabulate

import tritonattn
from tritonattn.cli.options import whole_number
from tritonattn.core.provenance import Environment
from tritonattn.core.records import FIGURES

from ..options import command_line

BFLOAT = torch.bfloat16
_CALLS = 5  # of a round, whose mean is taken
_IN_A_ROW = 20  # rounds of a call before the next call's turn


def calls() -> dict[str, Callable[[], object]]:
    """By name: [1, 4, 64, 64] in bf16, causal; decoding of 2 sequences, 8 heads over 2, a capacity of 4096."""
    found: dict[str, Callable[[], object]] = {}
    modes = ("sqrt_dim", "key_count", "key_norm_sum")
    q, k, v, d_out = torch.randn(4, 1, 4, 64, 64, dtype=BFLOAT)
    leaves = [x.clone().requires_grad_() for x in (q, k, v)]
    attend = {mode: partial(tritonattn.attention, scaling=mode, causal=True, backend="triton") for mode in modes}
    found |= {f"forward, {mode}": partial(attend[mode], q, k, v) for mode in modes}
    found |= {f"with backward, {mode}": partial(_with_backward, attend[mode], leaves, d_out) for mode in modes}
    q, (k, v) = torch.randn(2, 8, 1, 64, dtype=BFLOAT), torch.randn(2, 2, 2, 4096, 64, dtype=BFLOAT)
    decode = partial(tritonattn.attention_decode, q, k, v, key_lengths=torch.tensor([4000, 100]), backend="triton")
    found |= {f"decode, {mode}": partial(decode, scaling=mode) for mode in modes[:2]}
    record = tritonattn.KeyStatistics(2, 2, 4096)
    found["decode, key_norm_sum and KeyStatistics"] = partial(decode, scaling=modes[2], statistics=record)
    starts, (q, k, v) = torch.tensor([0, 30, 64], dtype=torch.int32), torch.randn(3, 64, 4, 64, dtype=BFLOAT)
    packed = partial(tritonattn.attention_varlen, q, k, v, starts, starts, 34, 34, causal=True, backend="triton")
    return {**found, "packed, sqrt_dim": packed}


def _with_backward(attend: Callable, leaves: list[torch.Tensor], d_out: torch.Tensor) -> None:
    torch.autograd.grad(attend(*leaves), leaves, d_out)


def measured(rounds: int, capability: int) -> list[tuple]:
    """For each call: its name, microseconds (least and median of the rounds), launches and torch operators."""
    from tests.stub import installed
    from tests.support.device_work import values_unread, work_of_torch
    from tritonattn.backends.triton import launch

    stub, compared = installed(), calls()
    with stub.active(capability), values_unread():
        work = {name: work_of_torch(call) for name, call in compared.items()}
        counts = {name: launches_of(stub, call) for name, call in compared.items()}
        launch.run = lambda *launched: launch.run_on_device(*launched)  # without the stub's note of each
        taken = in_turn(rounds, compared)
    return [
        (name, f"{min(times):.0f}", f"{statistics.median(times):.0f}", counts[name], len(work[name]))
        for name, times in taken.items()
    ]


def launches_of(stub: Any, call: Callable[[], object]) -> int:
    """Launches of one call, of kernels that have been compiled."""
    before = stub.count("launches")
    call()
    return stub.count("launches") - before


def in_turn(rounds: int, calls: dict[Any, Callable[[], object]]) -> dict[Any, list[float]]:
    """CPU microseconds of the rounds of each call, _IN_A_ROW of them before the next call's turn."""
    taken: dict[Any, list[float]] = {name: [] for name in calls}
    gc.disable()
    for first in range(0, rounds, _IN_A_ROW):
        for name, call in calls.items():
            call()
            taken[name] += [_microseconds(call) for _ in range(min(_IN_A_ROW, rounds - first))]
    gc.enable()
    return taken


def _microseconds(call: Callable[[], object]) -> float:
    """CPU microseconds of one call of several."""
    start = time.thread_time_ns()
    for _ in range(_CALLS):
        call()
    return (time.thread_time_ns() - start) / 1000 / _CALLS


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--rounds", type=whole_number, default=300, help="default: %(default)s")
    parser.add_argument("--capability", type=whole_number, default=90, help="of the GPU; default: %(default)s")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> None:
    torch.set_num_threads(1)
    rows = measured(options.rounds, options.capability)
    where = Environment.of(torch.device("cpu"), command_line("launches", options))
    print(f"Simulated on a stub of NVIDIA's driver: {where}.\n")
    print(tabulate(rows, ("call", "us, least", "us, median", "launches", "torch operators"), "github", **FIGURES))
