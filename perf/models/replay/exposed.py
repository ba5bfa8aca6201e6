"""Loads ahead of their use: how far a loop asks ahead, and what of a load's time that leaves exposed."""

from __future__ import annotations

from typing import NamedTuple

from ..static.model import Rates, cycles, turns
from .loops import HotLoop
from .operations import Operation
from .parameters import Parameters


class Flight(NamedTuple):
    """From a request to the wait for it.

    iterations   ends of iterations between them: 1 where an iteration waits for what the one before it asked for
    apart        the same as a share of the loop's instructions, 1.5 iterations say
    groups       cp.async groups that may be outstanding behind the loop's first wait for them; None without
    """

    iterations: int
    apart: float
    groups: int | None


def flight(path: list[Operation], stages: int) -> Flight:
    """Find the shortest flight of a loop's asynchronous loads; one of 0 iterations where it has none.

    A wait for groups says itself how many it lets fly; requests of the TMA are as many iterations ahead as a pipeline
    of `stages` asks.
    """
    found: list[tuple[float, int]] = []
    groups = None
    commits, waits = _positions(path, "commit"), _positions(path, "copy wait")
    if commits and waits:
        groups = path[waits[0]].amount
        back = len([position for position in commits if position < waits[0]]) - 1 - groups
        iterations, position = -(back // len(commits)), commits[back % len(commits)]
        found.append((iterations + (waits[0] - position) / len(path), iterations))
    requests, polls = _positions(path, "request"), _positions(path, "poll")
    if requests and polls:
        found.append((stages - 1 + (polls[0] - requests[-1]) / len(path), stages - 1))
    apart, iterations = min(found, default=(0.0, 0))
    return Flight(iterations, apart, groups)


class Bounds(NamedTuple):
    """Clocks of an iteration: where a program's products and the rest take turns, and where they overlap.

    exposed   clocks that loads leave exposed: max(0, latency + bytes / rate - clocks between request and wait);
              in `clocks`
    """

    clocks: float
    exposed: float
    overlapped: float


def _positions(path: list[Operation], act: str) -> list[int]:
    return [position for position, operation in enumerate(path) if operation.act == act]


def bounded_clocks(
    loop: HotLoop, path: list[Operation], ahead: Flight, parameters: Parameters, rates: Rates, warps: int, programs: int
) -> Bounds:
    """Bound the clocks of an iteration while `programs` run, from the rates of units and what loads leave exposed."""
    overlapped = programs * max(cycles(loop.work, rates, warps).values())
    in_turn = max(overlapped, sum(turns(loop.work, rates, warps))) if loop.work.operand_bytes else overlapped
    copied = sum(one.amount for one in path if one.act == "copy") * warps / 4
    latency = parameters.request_latency if loop.request_bytes else parameters.copy_latency
    load = latency + (loop.request_bytes + copied) / parameters.l2_bytes
    exposed, least = (max(0.0, load - ahead.apart * busy) for busy in (in_turn, overlapped))
    return Bounds(in_turn + exposed, exposed, overlapped + least)
