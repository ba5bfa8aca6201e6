"""The timing protocol: contestants take turns, each call on fresh caches and the next set of inputs; quartiles."""

from __future__ import annotations

import math
import random
import statistics
import subprocess
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch

# A contestant takes the number of the round, by which it chooses among its copies of the inputs.
Contestant = Callable[[int], object]

_FLUSHED_BYTES = 2**28  # more than any L2 of today
_FREED_BYTES = 2**25 - 2**16
_WARM_UP_SECONDS = 0.3
_MOST_FLUSHES = 32
_FEWEST_ROUNDS = 3  # of a measurement that its time limit cuts short: a median of fewer means little


@dataclass(frozen=True)
class Timing:
    """Median and quartiles over rounds, in milliseconds of a call."""

    median: float
    lower: float
    upper: float
    rounds: int

    @classmethod
    def of(cls, milliseconds: list[float]) -> Timing:
        if len(milliseconds) == 1:
            return cls(milliseconds[0], milliseconds[0], milliseconds[0], 1)
        lower, _, upper = statistics.quantiles(milliseconds, n=4, method="inclusive")
        return cls(statistics.median(milliseconds), lower, upper, len(milliseconds))


def median_ratio(times: list[float], baseline: list[float]) -> float:
    """Compute the median of the rounds' ratios, so that noise of a whole round cancels."""
    return statistics.median(ours / theirs for ours, theirs in zip(times, baseline, strict=True))


def take_turns(
    contestants: Mapping[str, Contestant],
    device: torch.device,
    rounds: int,
    warm_up: float = _WARM_UP_SECONDS,
    seconds: float = math.inf,
) -> dict[str, list[float]]:
    """Time every contestant in every round, in milliseconds: A B C, C A B, ..., so that a noisy moment meets all.

    The order of a round is random, the same in every run, since a contestant pays for what the one before it leaves
    behind (caches, freed memory). Each contestant is called once before, which compiles it, then in turn for `warm_up`
    seconds, so that clocks are steady. On a GPU the L2 cache is overwritten before each call, and events take the time
    of the card without the host's: the cache is overwritten until the host has launched the whole call before the card
    comes to it. On a CPU with one thread it is the time of that thread, which does not run while other programs do.
    After `seconds` no further round begins, but there are three at least.
    """
    measure = _on_gpu(device) if device.type == "cuda" else _on_cpu()
    for contestant in contestants.values():
        contestant(0)
    number, start = 0, time.perf_counter()
    while time.perf_counter() - start < warm_up:
        for contestant in contestants.values():
            measure(contestant, number)
        number += 1
    taken: dict[str, list[float]] = {name: [] for name in contestants}
    order, draw, start = list(contestants), random.Random(0), time.perf_counter()
    for number in range(rounds):
        if number >= _FEWEST_ROUNDS and time.perf_counter() - start > seconds:
            break
        draw.shuffle(order)
        for name in order:
            taken[name].append(measure(contestants[name], number))
    return taken


def _on_cpu() -> Callable[[Contestant, int], float]:
    # glibc keeps freed memory mapped, up to twice the largest block freed so far, blocks above 32 MiB left out. Freeing
    # nearly 32 MiB now brings a fresh process to the state of one that has run for a while.
    torch.empty(_FREED_BYTES, dtype=torch.int8)
    clock = time.thread_time if torch.get_num_threads() == 1 else time.perf_counter

    def measure(contestant: Contestant, number: int) -> float:
        start = clock()
        contestant(number)
        return 1000 * (clock() - start)

    return measure


def _on_gpu(device: torch.device) -> Callable[[Contestant, int], float]:
    flushed, flushes = torch.empty(_FLUSHED_BYTES, dtype=torch.int8, device=device), 1

    def measure(contestant: Contestant, number: int) -> float:
        nonlocal flushes
        while True:
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            for _ in range(flushes):
                flushed.zero_()
            start.record()
            contestant(number)
            end.record()
            has_waited = start.query()  # if so, the card came to the call before all of it was launched
            end.synchronize()
            if not has_waited or flushes == _MOST_FLUSHES:  # the latter of a contestant that itself waits for the card
                return start.elapsed_time(end)
            flushes *= 2

    return measure


def card_state(device: torch.device) -> dict[str, str]:
    """Read clocks, temperature, power and driver from nvidia-smi; empty without it."""
    names = ("driver_version", "clocks.sm", "clocks.mem", "temperature.gpu", "power.draw")
    if device.type != "cuda" or torch.version.hip:
        return {}
    # By its UUID, since CUDA_VISIBLE_DEVICES renumbers the cards for torch alone.
    card = f"GPU-{torch.cuda.get_device_properties(device).uuid}"
    query = ["nvidia-smi", f"--query-gpu={','.join(names)}", "--format=csv,noheader", "-i", card]
    try:
        line = subprocess.run(query, capture_output=True, text=True, check=True, timeout=10).stdout.splitlines()[0]
    except (OSError, subprocess.SubprocessError, IndexError):
        return {}
    return dict(zip(names, (part.strip() for part in line.split(",")), strict=False))
