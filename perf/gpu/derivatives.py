"""Hold the kernels of derivatives beyond the first to float64 on a GPU, then time them against SDPA's math path.

Values: each kernel in the config in use, of all tensors and tangents, in bf16 and fp16. Times: the causal cases of
`python -m perf cpu` in bf16, a jvp and a gradient with the gradient of each, of 8 heads.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import replace
from itertools import product

import torch
from tabulate import tabulate

from tritonattn.autotune.timing import Timing, median_ratio, take_turns
from tritonattn.autotune.workload import Workload
from tritonattn.backends.triton import launch
from tritonattn.tuning.calls import Size
from tritonattn.tuning.config import SECOND_KERNELS, TileConfig
from tritonattn.tuning.table import Key, keys

from ..cpu import cpu
from ..devices import kernels_on, obstacle, origin

DTYPES = (torch.bfloat16, torch.float16)
HEAD_DIMS, LENGTHS = (64, 128), (1024, 4096)
_TINY_TILES = TileConfig(16, 16, 1, 2)
_SECONDS = 5.0  # of a case's rounds


def wrong(device: torch.device, tiny: bool) -> Iterator[str]:
    """Describe what is wrong with a kernel's results, if anything; a line for each that was checked is printed."""
    of_kernels = keys(SECOND_KERNELS, HEAD_DIMS)
    wanted = [Key(kernel, 64, "query+key", "long") for kernel in SECOND_KERNELS] if tiny else list(of_kernels)
    for key, dtype in product(wanted, DTYPES[:1] if tiny else DTYPES):
        problem = replace(key.problem, dtype=dtype)
        size = Size(1, 2, 17, 18) if tiny else Size(1, 4, 1000 if problem.short else 2040, 2040)
        if tiny:
            problem = replace(problem, head_dim=16, value_dim=16)
        error = Workload(key.kernel, problem, size, device, copies=1).error()
        print(f"{key}, {str(dtype).removeprefix('torch.')}: {error or 'within the bound of float64'}", flush=True)
        if error:
            yield f"{key}: {error}"


def times(device: torch.device, head_dim: int, length: int, rounds: int) -> list[list[str]]:
    """Time each derivative with its gradient, in turns: case, attention, head dim, length, milliseconds, ratio."""
    compared = {name: of for name, of in cpu.cases(length).items() if name.endswith("its gradient")}
    random = torch.Generator(device).manual_seed(0)
    shape = (1, cpu.HEADS, length, head_dim)
    drawn = [torch.randn(shape, generator=random, device=device).bfloat16() for _ in range(4)]
    tensors = [*(x.requires_grad_() for x in drawn[:3]), drawn[3]]
    rows = []
    for case, attends in compared.items():
        contestants = {name: lambda _, one=one: cpu.forward_backward(one, tensors) for name, one in attends.items()}
        taken = take_turns(contestants, device, rounds, seconds=_SECONDS)
        first = next(iter(taken.values()))
        for name, milliseconds in taken.items():
            ratio = median_ratio(milliseconds, first)
            rows.append([case, name, head_dim, length, f"{Timing.of(milliseconds).median:.3f}", f"{ratio:.3f}"])
    return rows


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--device", choices=("cuda", "emulate"), default="cuda", help="emulate: tiny, without times")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> None:
    if reason := obstacle(options.device):
        sys.exit(f"derivatives: {reason}")
    tiny = options.device == "emulate"
    with kernels_on(options.device) as device, ExitStack() as stack:
        for kernel in SECOND_KERNELS if tiny else ():
            stack.enter_context(launch.configured(kernel, _TINY_TILES))
        errors = list(wrong(device, tiny))
        cases = [(16, 16)] if tiny else list(product(HEAD_DIMS, LENGTHS))
        rows = [row for case in cases for row in times(device, *case, 1 if tiny else 20)]
        card = origin(device)
    headers = ["case", "attention", "D", "length", "ms", "ratio to the first"]
    print(f"\n{card}\n\n{tabulate(rows, headers, 'github', disable_numparse=True)}")
    if errors:
        sys.exit("\n".join([f"derivatives: {len(errors)} kernels are wrong", *errors]))
