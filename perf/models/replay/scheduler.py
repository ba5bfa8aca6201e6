"""Replay of a loop by the warps of one scheduler: in order, an instruction per clock, by the loop's control codes.

Event by event: each step goes to the next clock at which some warp may issue. By symmetry one of a processor's four
schedulers stands for all: of every warpgroup it has one warp, and units that the four share are taken by them in step.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable
from typing import NamedTuple

from .operations import PIPES, QUEUES, Operation
from .parameters import Parameters
from .units import Channel, Gate, Pipe, Queue, RegisterFile, Requests, TensorUnit

_NEVER = math.inf
# Clocks between the starts of a processor's programs.
_STAGGER = 500
# Clocks until a queued instruction has read its operands.
_READ = 10


class Warps(NamedTuple):
    """Warps of a scheduler: `programs` with `each` of them.

    ahead            polls from a request of the TMA to the one that waits for it
    request_bytes    that one request loads
    """

    programs: int
    each: int
    ahead: int = 0
    request_bytes: float = 0.0


class Timeline(NamedTuple):
    """clocks: of an iteration, which all warps run at once. waits: shares of a warp's time, by reason."""

    clocks: float
    waits: dict[str, float]


class Deadlock(RuntimeError):
    """No warp can ever issue again: the loop is not as the replay takes it to be."""


class _Warp:
    """A warp; `free`: the clock from which on it could issue its next operation if all units were free."""

    def __init__(self, program: int, rank: int, start: float) -> None:
        self.program, self.rank = program, rank
        self.index = self.polls = 0
        self.boards = [0.0] * 6
        self.groups: list[float] = []  # completions of closed groups of products
        self.copies: list[float] = []  # completions of closed groups of cp.async
        self.open_bytes = 0
        self.ready, self.held_by = start, "fixed latency"
        self.free, self.reason = start, "fixed latency"
        self.since = start  # the clock after its last issue
        self.turn = 0.0 if rank == 0 else _NEVER
        self.heads: list[float] = []  # clocks of each iteration's first issue
        self.waits: dict[str, float] = defaultdict(float)


class Scheduler:
    """Warps that run one loop, and the units that they share; for one `run`."""

    def __init__(self, loop: list[Operation], warps: Warps, parameters: Parameters) -> None:
        self._loop, self._parameters, self._shape = loop, parameters, warps
        self._units = {name: Pipe() for name in PIPES} | {name: Queue() for name in QUEUES}
        self._tensor, self._registers = TensorUnit(parameters), RegisterFile(parameters)
        self._channel = Channel(parameters.l2_bytes)
        free = Gate()
        self._gates = [self._gate(operation, free) for operation in loop]
        requests, polls = (sum(one.act == act for one in loop) for act in ("request", "poll"))
        each = requests // polls if polls else 0
        self._requests = [Requests(each, warps.ahead) for _ in range(warps.programs)]
        self._warps = [
            _Warp(program, rank, program * _STAGGER) for program in range(warps.programs) for rank in range(warps.each)
        ]
        self._arrived = [0] * warps.programs
        self._acts: dict[str, Callable[[_Warp, Operation, float], float]] = {
            "": self._plain,
            "product": self._product,
            "product wait": self._plain,
            "copy": self._copy,
            "commit": self._commit,
            "copy wait": self._plain,
            "request": self._request,
            "poll": self._poll,
            "barrier": self._barrier,
            "turn": self._turn,
            "pass": self._pass,
        }
        for warp in self._warps:
            self._look_ahead(warp)

    def _gate(self, operation: Operation, free: Gate) -> Gate | Pipe | Queue:
        if operation.act == "product":
            return self._tensor.of_registers if operation.in_registers else self._tensor.of_shared
        return self._units.get(operation.unit, free)

    def run(self, iterations: int, warm: int) -> Timeline:
        """Run until every warp has begun that many iterations; the figures are of those behind the first `warm`."""
        now, first, warps = 0.0, 0, self._warps
        gates, loop, registers = self._gates, self._loop, self._registers
        orders = [warps[start:] + warps[:start] for start in range(len(warps))]
        while any(len(warp.heads) < iterations for warp in warps):
            soonest = _NEVER
            for warp in orders[first]:
                index = warp.index
                clock = max(warp.free, gates[index].accepts)
                if loop[index].operands and registers.accepts > clock:
                    clock = registers.accepts
                if clock <= now:
                    break
                soonest = min(soonest, clock)
            else:
                if soonest == _NEVER:
                    raise Deadlock(f"loop: expected warps to go on, all wait at {[loop[w.index].name for w in warps]}")
                now = float(math.ceil(soonest))
                continue
            self._issue(warp, now, len(warp.heads) > warm)
            now += 1
            first = (warp.program * self._shape.each + warp.rank + 1) % len(warps)
        return self._timeline(warm)

    def _timeline(self, warm: int) -> Timeline:
        lengths = [(warp.heads[-1] - warp.heads[warm]) / (len(warp.heads) - 1 - warm) for warp in self._warps]
        clocks = sum(warp.since - 1 - warp.heads[warm] for warp in self._warps)
        names = {name for warp in self._warps for name in warp.waits}
        waits = {name: sum(warp.waits.get(name, 0.0) for warp in self._warps) / clocks for name in names}
        longest_first = dict(sorted(waits.items(), key=lambda one: (-one[1], one[0])))
        return Timeline(sum(lengths) / len(lengths), longest_first)

    def _issue(self, warp: _Warp, now: float, is_counted: bool) -> None:
        operation = self._loop[warp.index]
        if is_counted:
            self._count_wait(warp, operation, now)
        if warp.index == 0:
            warp.heads.append(now)
        control = operation.control
        stall = max(1, control.stall)
        warp.ready, warp.held_by, warp.since = now + stall, "fixed latency", now + 1
        done = self._acts[operation.act](warp, operation, now)
        if operation.operands:
            self._registers.read(now, operation.operands, self._tensor.is_running(now))
        boards = warp.boards
        if control.writes is not None:
            boards[control.writes] = max(boards[control.writes], done if operation.latency else now + stall)
        if control.reads is not None:
            read = now + (_READ if operation.latency else stall)
            boards[control.reads] = max(boards[control.reads], read)
        warp.index += 1
        if warp.index == len(self._loop):
            warp.index = 0
            warp.ready += self._parameters.back_edge
        self._look_ahead(warp)

    def _count_wait(self, warp: _Warp, operation: Operation, now: float) -> None:
        """Give the clocks since the warp's last issue to what held it longest, and the rest to other warps' turns."""
        held = max(warp.since, min(math.ceil(warp.ready), now))
        warp.waits[warp.held_by] += held - warp.since
        limits = [(warp.free, warp.reason), (self._gates[warp.index].accepts, operation.unit)]
        if operation.operands:
            limits.append((self._registers.accepts, "registers"))
        clock, reason = max(limits)
        clock = max(held, math.ceil(clock))
        warp.waits[reason] += clock - held
        warp.waits["issue"] += now - clock

    def _look_ahead(self, warp: _Warp) -> None:
        """Find from which clock on a warp itself could issue its next operation, and the reason."""
        operation = self._loop[warp.index]
        clock, reason = warp.ready, warp.held_by
        for board in operation.control.waits:
            if warp.boards[board] > clock:
                clock, reason = warp.boards[board], "scoreboard"
        act, other, why = operation.act, 0.0, ""
        if act == "product wait" and len(warp.groups) > operation.amount:
            other, why = warp.groups[-operation.amount - 1], "products"
        elif act == "copy wait" and len(warp.copies) > operation.amount:
            other, why = warp.copies[-operation.amount - 1], "loads"
        elif act == "poll":
            other, why = self._requests[warp.program].arrival(warp.polls), "loads"
            other += self._parameters.poll_release if other > clock else 0.0
        elif act == "turn":
            other, why = warp.turn, "turn"
        warp.free, warp.reason = (other, why) if other > clock else (clock, reason)

    def _wake(self, program: int) -> None:
        for warp in self._warps:
            if warp.program == program and warp.free == _NEVER:
                self._look_ahead(warp)

    # ---- What an operation does; each returns the clock at which its result is there

    def _plain(self, warp: _Warp, operation: Operation, now: float) -> float:
        if not operation.unit:
            return now + operation.latency
        turn = operation.turn
        if operation.unit == "exp" and self._tensor.has_work(now):
            turn *= self._parameters.exp_during_products
        return self._units[operation.unit].take(now, turn) + operation.latency

    def _product(self, warp: _Warp, operation: Operation, now: float) -> float:
        done = self._tensor.take(now, operation.turn)
        if operation.amount:
            warp.groups.append(done)
        return done

    def _copy(self, warp: _Warp, operation: Operation, now: float) -> float:
        warp.open_bytes += operation.amount
        return self._plain(warp, operation, now)

    def _commit(self, warp: _Warp, operation: Operation, now: float) -> float:
        warp.copies.append(self._channel.carry(now, warp.open_bytes) + self._parameters.copy_latency)
        warp.open_bytes = 0
        return now

    def _request(self, warp: _Warp, operation: Operation, now: float) -> float:
        if warp.rank == 0:  # one thread asks for the whole program
            last = self._channel.carry(now + self._parameters.request_start, self._shape.request_bytes)
            self._requests[warp.program].add(last + self._parameters.request_latency)
            self._wake(warp.program)
        return now + operation.latency

    def _poll(self, warp: _Warp, operation: Operation, now: float) -> float:
        warp.polls += 1
        return now + operation.latency

    def _barrier(self, warp: _Warp, operation: Operation, now: float) -> float:
        self._arrived[warp.program] += 1
        stall, warp.ready, warp.held_by = warp.ready - now, _NEVER, "barrier"
        if self._arrived[warp.program] == self._shape.each:
            self._arrived[warp.program] = 0
            for other in self._warps:
                if other.program == warp.program:
                    other.ready = now + self._parameters.barrier + stall
            self._wake(warp.program)
        return now

    def _turn(self, warp: _Warp, operation: Operation, now: float) -> float:
        warp.turn = _NEVER
        return now

    def _pass(self, warp: _Warp, operation: Operation, now: float) -> float:
        following = self._warps[warp.program * self._shape.each + (warp.rank + 1) % self._shape.each]
        following.turn = now + self._parameters.barrier
        self._wake(warp.program)
        return now
