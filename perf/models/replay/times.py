"""Times of whole forward calls on an H100 from the clocks of their loops, next to published ones.

A processor runs its tiles one after another: each fills its pipeline, runs its iterations, and drains. Fitted to
FlashAttention-3: loops take LOOPS times as long as replayed, and fill and drain of a tile. The constants of Triton's
kernels are sums of latencies, not fitted.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path

from .parameters import PARAMETERS

PUBLISHED = Path(__file__).with_name("published.json")
PROCESSORS = 132
CLOCK = 1500  # MHz, of the published times of FlashAttention-3
LAUNCH = 5500  # clocks
LOOPS = 1.085

# FlashAttention-3: clocks of fill and drain of a tile by head dim, of masking a block, and the longest tile's share
# that processors wait for at the end of a causal call.
_FILL_AND_DRAIN = {64: 4400, 128: 3200}
_MASKED_BLOCK = 700
_LAST_TILE = 0.25


@dataclass(frozen=True)
class Loop:
    """A kernel's loop: rows x keys of its tile, and replayed clocks of an iteration of the processor's one program."""

    head_dim: int
    causal: bool
    rows: int
    keys: int
    clocks: float


@dataclass(frozen=True)
class Point:
    """A published forward call, with its time or its rate."""

    batch: int
    length: int
    heads: int
    head_dim: int
    causal: bool
    microseconds: float = 0.0
    tflops: float = 0.0


def published(kernel: str) -> tuple[list[Loop], list[Point]]:
    """Read the recorded loops and points of "flash_attention_3" or "triton_tutorial"."""
    record = json.loads(PUBLISHED.read_text(encoding="utf-8"))[kernel]
    return [Loop(**one) for one in record["loops"]], [Point(**one) for one in record["points"]]


def tflops(point: Point, microseconds: float) -> float:
    """Compute the rate of a call, of whose products a causal one needs half."""
    flops = 4 * point.batch * point.heads * point.length**2 * point.head_dim
    return flops * (0.5 if point.causal else 1.0) / microseconds / 1e6


def flash_attention_3_clocks(point: Point, loop: Loop) -> float:
    """Model the clocks of FlashAttention-3: one program per processor, which takes tile after tile."""
    block, ends = LOOPS * loop.clocks, _FILL_AND_DRAIN[point.head_dim]
    rows = math.ceil(point.length / loop.rows)
    if not point.causal:
        turns = math.ceil(point.batch * point.heads * rows / PROCESSORS)
        return LAUNCH + turns * (math.ceil(point.length / loop.keys) * block + ends)
    masked = _MASKED_BLOCK * math.ceil(loop.rows / loop.keys)
    reach = [min((row + 1) * loop.rows, point.length) for row in range(rows)]
    tiles = [math.ceil(keys / loop.keys) * block + ends + masked for keys in reach]
    return LAUNCH + sum(tiles) * point.batch * point.heads / PROCESSORS + _LAST_TILE * max(tiles)


def triton_clocks(point: Point, loop: Loop) -> float:
    """Model the clocks of a full call of a Triton kernel: a processor's program loads q, then k and v, then loops."""
    parameters, width = PARAMETERS["90"], 2 * point.head_dim
    loads = 2 * parameters.request_latency + (loop.rows + 2 * loop.keys) * width / parameters.l2_bytes
    tile = math.ceil(point.length / loop.keys) * LOOPS * loop.clocks + 2500 + loads  # 2500: set-up and the output
    return LAUNCH + math.ceil(point.batch * point.heads * math.ceil(point.length / loop.rows) / PROCESSORS) * tile


def error_of_flash_attention_3(shortest: int = 0) -> float:
    """Compute the mean relative error of modelled times at published points of at least so many keys."""
    loops, points = published("flash_attention_3")
    loop_of = {(loop.head_dim, loop.causal): loop for loop in loops}
    wanted = [point for point in points if point.length >= shortest]
    ratios = [
        flash_attention_3_clocks(point, loop_of[point.head_dim, point.causal]) / CLOCK / point.microseconds
        for point in wanted
    ]
    return sum(abs(ratio - 1) for ratio in ratios) / len(ratios)


def clocks_of_triton_tutorial() -> list[float]:
    """Compute the MHz at which each published rate of Triton's tutorial is the modelled one, with its fastest loop."""
    loops, points = published("triton_tutorial")
    loop = min(loops, key=lambda one: one.clocks / (one.rows * one.keys))
    return [CLOCK * point.tflops / tflops(point, triton_clocks(point, loop) / CLOCK) for point in points]
