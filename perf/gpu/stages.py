"""Time the kernels with two and three stages of their pipeline, next to what the replay of their loops says.

Full attention in bf16, 8,192 tokens of 16 heads: the shipped config, and the same with other stages. Where three stages
gain less than 1.15 over two in the forward on sm_90, the replay's loads are wrong, and the tables' ranks with them.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import dataclass, replace
from itertools import product

import torch
from tabulate import tabulate

from tritonattn.autotune.timing import Timing, take_turns
from tritonattn.autotune.workload import Workload
from tritonattn.backends.triton import launch
from tritonattn.tuning import Problem, Target, compile_kernel
from tritonattn.tuning.calls import Size
from tritonattn.tuning.config import TileConfig, legal_reasons
from tritonattn.tuning.lookup import config_for

from ..devices import kernels_on, obstacle, origin
from ..models.replay import replay
from ..models.static.machine_code import flops_per_logit
from ..models.static.model import RATES

KERNELS = ("forward", "grad_query", "grad_key_value")
HEAD_DIMS = (64, 128)
STAGES = (2, 3)
_TOKENS, _HEADS = 8192, 16


@dataclass(frozen=True)
class Row:
    """A kernel with one number of stages. share: of the tensor rate that the replay says, or None."""

    kernel: str
    head_dim: int
    config: TileConfig
    timing: Timing
    tflops: float
    share: float | None


def contestants(kernel: str, problem: Problem, target: Target) -> list[TileConfig]:
    """List the shipped config with each number of stages that is legal."""
    shipped = config_for(kernel, problem, target)
    configs = [replace(shipped, num_stages=count) for count in STAGES]
    return [one for one in configs if not legal_reasons(kernel, one, problem, target)]


def measure(kernel: str, head_dim: int, size: Size, device: torch.device, rounds: int) -> list[Row]:
    """Time a kernel's configs in turns."""
    problem, target = Problem(head_dim, head_dim, torch.bfloat16), Target.of(device)
    work, configs = Workload(kernel, problem, size, device), contestants(kernel, problem, target)

    def running(config: TileConfig):
        def run(number: int) -> object:
            with launch.configured(kernel, config):
                return work(number)

        return run

    taken = take_turns({str(n): running(config) for n, config in enumerate(configs)}, device, rounds)
    flops = flops_per_logit(kernel, problem) * size.batch * size.heads * size.q_len * size.k_len
    rows = []
    for config, milliseconds in zip(configs, taken.values(), strict=True):
        timing = Timing.of(milliseconds)
        tflops = flops / timing.median / 1e9
        rows.append(Row(kernel, head_dim, config, timing, tflops, _share(kernel, problem, config, target)))
    return rows


def _share(kernel: str, problem: Problem, config: TileConfig, target: Target) -> float | None:
    if target.arch not in RATES:
        return None
    return replay(compile_kernel(kernel, problem, config, target), config, target).share


def report(rows: list[Row]) -> str:
    """Lay out a line for each kernel and number of stages, and what stages gain: measured, and modelled."""
    lines = []
    for row in rows:
        first = next(one for one in rows if (one.kernel, one.head_dim) == (row.kernel, row.head_dim))
        modelled = None if row.share is None or not first.share else row.share / first.share
        lines.append(
            [
                row.kernel,
                row.head_dim,
                f"{row.config.block_m} x {row.config.block_n}",
                row.config.num_stages,
                f"{row.timing.median:.3f}",
                f"{row.tflops:.0f}",
                "" if row.share is None else f"{row.share:.3f}",
                f"{first.timing.median / row.timing.median:.2f}",
                "" if modelled is None else f"{modelled:.2f}",
            ]
        )
    headers = ["kernel", "D", "tile", "stages", "ms", "TFLOPS", "share, modelled", "gain, measured", "gain, modelled"]
    return tabulate(lines, headers, "github", disable_numparse=True, stralign="right")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--device", choices=("cuda", "emulate"), default="cuda", help="emulate: tiny, without times")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> None:
    if reason := obstacle(options.device):
        sys.exit(f"stages: {reason}")
    tiny = options.device == "emulate"
    size = Size(1, 1, 32, 32) if tiny else Size(1, _HEADS, _TOKENS, _TOKENS)
    with kernels_on(options.device) as device:
        cases = product(KERNELS[:1], (16,)) if tiny else product(KERNELS, HEAD_DIMS)
        rows = [row for case in cases for row in measure(*case, size, device, 1 if tiny else 20)]
        card = origin(device)
    print(f"{card}\n\n{report(rows)}")
