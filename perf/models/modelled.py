"""Modelled milliseconds of a call, to stand next to the measured ones: its loops replayed, its tiles scheduled.

A launch of a kernel with a loop of products takes, in clocks,

    LAUNCH + the time until the last tile ends, where a tile takes (FIXED + iterations) * LOOPS * clocks of an iteration

Tiles start in the order of the grid (`schedule.py`). A tile's iterations are the blocks that are visible to it:
of windows, lengths and packed sequences the blocks that they reach, one with a mask for as long as one without; of a
dense mask all, in the loop for it. The clocks are those of the code that ran, replayed on sm_80 to sm_90 and bounded on
sm_100 and 120 (`replay/`). Decoding, fp32 (whose products are no tensor instructions, by which a replay finds its
loop) and AMD's cards have a static bound: the larger of products over the card's rate and bytes over its memory's; of
fp32 on AMD bytes alone. Other kernels, and the host, are left out.
"""

from __future__ import annotations

import functools
import re
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from tritonattn.backends.triton import KERNELS, launch
from tritonattn.tuning import Problem, Target, TileConfig, compile_kernel
from tritonattn.tuning.config import TILED_KERNELS, holds_keys, one_line
from tritonattn.tuning.gpus import GPU, known, nearest
from tritonattn.tuning.order import Sections

from .replay import Replay, replay
from .replay.times import LAUNCH, LOOPS
from .schedule import FIXED, end_on, programs
from .static.machine_code import flops_per_logit
from .static.model import RATES

_NAMES = {KERNELS[name]: name for name in TILED_KERNELS}


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
    if gpu is None or not launches:
        return None
    itemsize = max(one.arguments.specialisation.problem.dtype.itemsize for one in launches)
    if itemsize > 2 or target.arch not in RATES or any(_NAMES[one.kernel] == "decode" for one in launches):
        return _bound(gpu, flops, size, itemsize, card)
    try:
        clocks = sum(_clocks(one, target, target.processors or gpu.processors) for one in launches)
    except Exception as error:  # a model must not end a measurement
        print(f"modelled: {one_line(error)}", file=sys.stderr)
        return None
    return clocks / _megahertz(gpu, card) / 1000


@contextmanager
def _tiled_launches() -> Iterator[list[Any]]:
    """Collect the launches inside, of kernels with a loop of products, in all threads, since a backward has another."""
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


def _bound(gpu: GPU, flops: int, size: int, itemsize: int, card: Mapping[str, str]) -> float:
    """Milliseconds that a call takes at least, by the card's rate of products of such operands and its memory's."""
    of_memory, rates = size / gpu.bandwidth / 1e9, RATES.get(gpu.target.arch)
    if itemsize <= 2:
        return max(flops / gpu.teraflops / 1e9, of_memory)
    if rates is None:
        return of_memory
    return max(flops / (2 * rates.fp32 * gpu.processors * _megahertz(gpu, card)) / 1000, of_memory)


def _clocks(one: Any, target: Target, processors: int) -> float:
    """Model the clocks of a launch."""
    kernel, problem, config, arguments = (
        _NAMES[one.kernel],
        one.arguments.specialisation.problem,
        one.config,
        one.arguments,
    )
    ran = (kept.compiled for key, kept in arguments.specialisation.codes.items() if key[:2] == (id(one.kernel), config))
    found = _replayed(kernel, problem, config, target, next(ran, None))
    of_block = 1
    if problem.mask:  # its loop takes a block in parts
        of_block = max(1, round(flops_per_logit(kernel, problem) * config.block_m * config.block_n / found.flops))
    iterations = _iterations(kernel, config, arguments)
    steps = [FIXED + of_block * iterations[tile] for tile in _tiles(kernel, one.grid, arguments) if tile in iterations]
    return LAUNCH + end_on(processors * max(1, found.programs), steps) * LOOPS * found.clocks


def _tiles(kernel: str, grid: tuple[int, int, int], arguments: Mapping[str, Any]) -> Iterator[tuple[int, int]]:
    """(sequence, block) of a launch's programs, in the order in which they start."""
    size, blocks, count = grid
    of_keys = holds_keys(kernel)
    heads = arguments["q_heads"] // (arguments["group"] if of_keys else 1)
    last_first = not of_keys and arguments["right"] is not None
    for head, step in filter(None, programs(size * count + arguments["first_head"], blocks, Sections(size, count), 1)):
        yield head // heads, blocks - 1 - step if last_first else step


@functools.lru_cache(maxsize=256)
def _replayed(kernel: str, problem: Problem, config: TileConfig, target: Target, code: Any) -> Replay:
    return replay(code or compile_kernel(kernel, problem, config, target), config, target)


def _iterations(kernel: str, config: TileConfig, arguments: Mapping[str, Any]) -> dict[tuple[int, int], int]:
    """Count, by (sequence, block), blocks of keys visible to a block of rows, or of rows that attend to one of keys.

    Blocks of rows are counted in each head of a group.
    """
    found: dict[tuple[int, int], int] = {}
    size_m, size_n = config.block_m, config.block_n
    for sequence, (lo, hi, keys) in enumerate(_visible(arguments)):
        if holds_keys(kernel):
            for block in range(-(-keys // size_n)):
                rows = ((lo < (block + 1) * size_n) & (hi > block * size_n) & (lo < hi)).nonzero()
                parts = int(rows[-1]) // size_m - int(rows[0]) // size_m + 1 if len(rows) else 0
                found[sequence, block] = parts * arguments["group"]
        else:
            for block in range(-(-len(lo) // size_m)):
                some = slice(block * size_m, (block + 1) * size_m)
                least, most = lo[some][lo[some] < hi[some]], hi[some][lo[some] < hi[some]]
                parts = -(-int(most.max()) // size_n) - int(least.min()) // size_n if len(least) else 0
                found[sequence, block] = parts
    return found


def _visible(arguments: Mapping[str, Any]) -> Iterator[tuple[Tensor, Tensor, int]]:
    """(lo, hi, keys) of each sequence: lo <= j < hi are visible to a row, as in `backends.triton.pairs.key_range`."""
    masks = arguments["masks"]
    starts = [masks.q_starts, masks.k_starts]
    if starts[0] is None:
        lengths = [(arguments["q_len"], arguments["k_len"])] * arguments["q"].ptr.shape[0]
    else:
        lengths = list(zip(*(x.cpu().diff().tolist() for x in starts), strict=True))
    ends, ranges = (None if x is None else x.cpu() for x in (masks.key_lengths, masks.key_ranges))
    for sequence, (rows, keys) in enumerate(lengths):
        positions = torch.arange(rows) + (keys - rows)
        left, right = (rows + keys if arguments[side] is None else arguments[side] for side in ("left", "right"))
        lo, hi = (positions - left).clamp(min=0), (positions + right + 1).clamp(max=keys)
        hi = hi if ends is None else hi.clamp(max=int(ends[sequence]))
        if ranges is not None:
            lo, hi = lo.maximum(ranges[sequence, :, 0]), hi.minimum(ranges[sequence, :, 1])
        yield lo, hi, keys


def _megahertz(gpu: GPU, card: Mapping[str, str]) -> float:
    """Return the clock that the card had, or the one of its peak rate."""
    if found := re.match(r"\d+", card.get("clocks.sm", "")):
        return float(found[0])
    return gpu.teraflops * 1e6 / (gpu.processors * RATES[gpu.target.arch].tensor)
