"""Modelled milliseconds of a call, to stand beside the measured ones: its loops replayed, its tiles scheduled.

A launch of a kernel with a loop of products takes, in clocks,

    LAUNCH + the time until the last tile ends, where a tile takes (FIXED + iterations) * LOOPS * clocks of an iteration

Tiles start in the order of the grid (`perf.schedule`). The clocks are those of the code that ran, replayed on sm_80 to
sm_90 and bounded on sm_100 and 120 (`perf.replay`). Decoding and AMD's cards have a static bound: the larger of
products over the card's rate and bytes over its memory's. Other kernels, and the host, are left out.
"""

from __future__ import annotations

import functools
import re
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import fields
from typing import Any

import torch

from tritonattn.backends.triton import KERNELS, launch
from tritonattn.tuning import Problem, Target, TileConfig, compile_kernel
from tritonattn.tuning.config import TILED_KERNELS, one_line
from tritonattn.tuning.gpus import GPU, known, nearest

from .replay import Replay, replay
from .replay.times import LAUNCH, LOOPS
from .schedule import FIXED, end_on
from .static.model import RATES

_NAMES = {KERNELS[name]: name for name in TILED_KERNELS}
# Options of a problem that leave all of its blocks, or those up to the diagonal.
_DENSE = {"right", "grouped", "query_scale", "key_scale", "query_scale_grad", "rounding", "wide_q", "wide_k"}
_DENSE |= {"aligned", "short"}


def milliseconds(
    call: Callable[[int], object], device: torch.device, flops: int, size: int, card: Mapping[str, str]
) -> float | None:
    """Model the call of ours that `call(0)` makes, once its kernels are compiled; None where there is no model.

    flops, size   operations of the call, and bytes that must move
    card          `card_state`: its "clocks.sm" is the clock, else that of the card's peak rate
    """
    if launch.interpreting or not launch.runs_on(device):
        return None
    with _tiled_launches() as launches:
        call(0)
    target = Target.of(device)
    gpu = known(target) or next(iter(nearest(target)), None)
    problems = [one.arguments.kind.problem for one in launches]
    if gpu is None or not launches or any(problem.dtype.itemsize != 2 for problem in problems):
        return None
    if target.arch not in RATES or any(_NAMES[one.kernel] == "decode" for one in launches):
        return max(flops / gpu.teraflops / 1e9, size / gpu.bandwidth / 1e9)
    if not all(map(_is_dense, problems)):
        return None
    try:
        clocks = sum(_clocks(one, target, target.processors or gpu.processors) for one in launches)
    except Exception as error:  # a model must not end a measurement
        print(f"modelled: {one_line(error)}", file=sys.stderr)
        return None
    return clocks / _megahertz(gpu, card) / 1000


@contextmanager
def _tiled_launches() -> Iterator[list[Any]]:
    """Collect the launches inside, of kernels with a loop of products, in all threads: a backward has its own."""
    found: list[Any] = []
    run = launch.run

    def watch(kernel: Any, grid: Any, arguments: Mapping[str, Any], config: TileConfig) -> None:
        run(kernel, grid, arguments, config)
        if kernel in _NAMES:
            found.append(launch.Launch(kernel, grid, arguments, config))

    launch.run = watch
    try:
        yield found
    finally:
        launch.run = run


def _is_dense(problem: Problem) -> bool:
    given = {one.name for one in fields(Problem)[3:] if getattr(problem, one.name) != one.default}
    return given <= _DENSE


def _clocks(one: Any, target: Target, processors: int) -> float:
    """Model the clocks of a launch."""
    kernel, problem, config = _NAMES[one.kernel], one.arguments.kind.problem, one.config
    ran = (kept.compiled for key, kept in one.arguments.kind.codes.items() if key[:2] == (id(one.kernel), config))
    found = _replayed(kernel, problem, config, target, next(ran, None))
    heads, blocks, sections = one.grid
    q, k = one.arguments["q"].ptr.shape, one.arguments["k"].ptr.shape
    steps = [FIXED + _iterations(kernel, problem, config, block, q, k) for block in range(blocks)]
    started = steps if kernel == "grad_key_value" else steps[::-1]  # the longest first
    tiles = [step for _ in range(sections) for step in started for _ in range(heads)]
    return LAUNCH + end_on(processors * max(1, found.programs), tiles) * LOOPS * found.clocks


@functools.lru_cache(maxsize=256)
def _replayed(kernel: str, problem: Problem, config: TileConfig, target: Target, code: Any) -> Replay:
    return replay(code or compile_kernel(kernel, problem, config, target), config, target)


def _iterations(kernel: str, problem: Problem, config: TileConfig, block: int, q: torch.Size, k: torch.Size) -> int:
    """Count the blocks of keys that a block of rows sees, or the blocks of rows of a group that see a block of keys."""
    q_len, k_len = q[2], k[2]
    past = k_len - q_len if problem.right else k_len
    if kernel == "grad_key_value":
        first = max(0, block * config.block_n - past) if problem.right else 0
        return max(0, -(-q_len // config.block_m) - first // config.block_m) * (q[1] // k[1])
    keys = min((block + 1) * config.block_m + past, k_len)
    return max(0, -(-keys // config.block_n))


def _megahertz(gpu: GPU, card: Mapping[str, str]) -> float:
    """Return the clock that the card had, or the one of its peak rate."""
    if found := re.match(r"\d+", card.get("clocks.sm", "")):
        return float(found[0])
    return gpu.teraflops * 1e6 / (gpu.processors * RATES[gpu.target.arch].tensor)
