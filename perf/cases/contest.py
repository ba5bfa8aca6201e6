"""A case of a sweep: contestants do the same work on the same inputs, are checked, and take turns."""

from __future__ import annotations

import math
import sys
import traceback
from collections.abc import Callable
from dataclasses import dataclass, replace
from datetime import date

import torch
from torch import Tensor

from tritonattn.autotune.timing import Contestant, Timing, card_state, median_ratio, take_turns
from tritonattn.core.provenance import Environment

from ..models.modelled import milliseconds
from .records import Axis, Record

Results = dict[str, Tensor]


class Unavailable(Exception):
    """A contestant cannot take part; the text says why, and goes into the record."""


# A peer's error up to so many bounds may come from its arithmetic; a larger one means other work.
_INEXACT = 4.0


class _Raised(Exception):
    """A contestant raised during the rounds; the text is its name, the cause is the exception."""


@dataclass(frozen=True)
class Verdict:
    """The worst result's largest error and its bound, both relative to the largest exact value."""

    error: float
    bound: float
    reason: str = ""  # the error, where there is one

    @property
    def bounds(self) -> float:
        """The error in bounds: above 1 it is wrong; inf for NaN."""
        if math.isnan(self.error):
            return math.inf
        if self.bound == 0:
            return math.inf if self.error else 0.0
        return self.error / self.bound


@dataclass(frozen=True)
class Entrant:
    """A contestant that may take part.

    prepare   makes the timed function, which takes a round's number and returns the results by name; raises
              Unavailable where it cannot do the case
    check     judges the results of round 0; None for a copy or a product of matrices
    ours      an exception fails the run; that of a peer is recorded, and the peer is skipped
    """

    name: str
    scaling: str
    prepare: Callable[[], Callable[[int], Results]]
    check: Callable[[Results], Verdict] | None
    ours: bool = False


@dataclass(frozen=True)
class Effort:
    """Rounds of a case, seconds after which none begins, seconds of warming up."""

    rounds: int
    seconds: float
    warm_up: float


@dataclass(frozen=True)
class Contest:
    """A case.

    enter      makes the entrants and their inputs when the case begins
    baseline   the name of the entrant whose time is the denominator of ratios
    flops, bytes   of a call, see perf/cases/work.py; 0 for no rate
    calls      calls that are timed together, where one is too short for a clock
    """

    suite: str
    axes: dict[str, Axis]
    enter: Callable[[], list[Entrant]]
    baseline: str
    device: torch.device
    flops: int = 0
    bytes: int = 0
    calls: int = 1

    def run(self, effort: Effort, environment: Environment) -> list[Record]:
        """Check and time the entrants; one record each."""
        _forget_compiled_code()
        blank = Record(self.suite, self.axes, "", "", "measured", environment, date.today().isoformat())
        states = [_try_out(entrant, blank) for entrant in self.enter()]
        while any(state.run is not None for state in states):
            contestants = {
                state.record.contestant: self._repeated(state.record.contestant, state.run)
                for state in states
                if state.run is not None
            }
            try:
                taken = take_turns(contestants, self.device, effort.rounds, effort.warm_up, effort.seconds)
            except _Raised as raised:
                name = str(raised)
                states = [one.dropped(raised) if one.record.contestant == name else one for one in states]
                continue
            card = card_state(self.device)
            return [self._modelled(state, self._timed(state.record, taken, card), card) for state in states]
        return [state.record for state in states]

    def _modelled(self, state: _State, record: Record, card: dict[str, str]) -> Record:
        """Add what the model says of a call of ours."""
        if not state.ours or state.run is None:
            return record
        return replace(record, modelled_ms=milliseconds(state.run, self.device, self.flops, self.bytes, card))

    def _repeated(self, name: str, contestant: Contestant) -> Contestant:
        def several(number: int) -> None:
            try:
                for _ in range(self.calls):
                    contestant(number)
            except Exception as error:  # for example out of memory, since all contestants hold some now
                raise _Raised(name) from error

        return several

    def _timed(self, record: Record, taken: dict[str, list[float]], card: dict[str, str]) -> Record:
        """Add an entrant's times to its record, if it was timed."""
        if record.contestant not in taken:
            return record
        milliseconds = [one / self.calls for one in taken[record.contestant]]
        timing = Timing.of(milliseconds)
        times = replace(
            record,
            median_ms=timing.median,
            lower_ms=timing.lower,
            upper_ms=timing.upper,
            rounds=timing.rounds,
            tflops=self.flops / timing.median / 1e9 if self.flops else None,
            gbps=self.bytes / timing.median / 1e6 if self.bytes else None,
            card=card,
        )
        if self.baseline not in taken:
            return times
        ratio = median_ratio(taken[record.contestant], taken[self.baseline])
        return replace(times, ratio=ratio, baseline=self.baseline)


@dataclass(frozen=True)
class _State:
    """An entrant after its trial: its record without times, and the function to time unless it is out."""

    record: Record
    ours: bool
    run: Contestant | None = None

    def dropped(self, raised: _Raised) -> _State:
        """Take the entrant out of the contest during its rounds."""
        cause = raised.__cause__
        assert isinstance(cause, Exception)
        return _State(raising(self.record, cause, self.ours, "when all take turns: "), self.ours)


def _try_out(entrant: Entrant, blank: Record) -> _State:
    """Prepare and call an entrant, and hold its results to their bound."""
    record = replace(blank, contestant=entrant.name, scaling=entrant.scaling)
    try:
        run = entrant.prepare()
        results = [run(0) for _ in range(2)]  # a backward may free or overwrite its saved tensors
    except Unavailable as error:
        return _State(replace(record, status="skipped", reason=str(error)), entrant.ours)
    except Exception as error:  # other libraries may raise anything
        return _State(raising(record, error, entrant.ours), entrant.ours)
    if entrant.check is None:
        return _State(record, entrant.ours, run)
    verdict = max(map(entrant.check, results), key=lambda one: one.bounds)
    record = replace(record, error=verdict.error, bound=verdict.bound, reason=verdict.reason)
    if not verdict.reason:
        return _State(record, entrant.ours, run)
    inexact = not entrant.ours and verdict.bounds <= _INEXACT
    return _State(replace(record, status="inexact" if inexact else "wrong"), entrant.ours)


def raising(record: Record, error: Exception, ours: bool = True, when: str = "") -> Record:
    """Record an exception: ours has failed, a peer is skipped."""
    lines = str(error).strip().splitlines()
    reason = f"{when}{type(error).__name__}: {lines[0] if lines else ''}"
    if ours:
        traceback.print_exception(error)
    return replace(record, status="failed" if ours else "skipped", reason=reason, error=None, bound=None)


def _forget_compiled_code() -> None:
    """Drop what torch.compile keeps for the shapes of one case, so that the next one has its whole limit."""
    if "torch._dynamo" in sys.modules:
        torch.compiler.reset()
