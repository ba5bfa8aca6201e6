"""The timed search: for each key, time the configs that pass the gate, in turns on the card itself.

First all of them in a few rounds, then the fastest in more, then the best one with other orders of its programs, or
other splits of a cache's keys: `candidates.shares`.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from datetime import date
from typing import Any

import torch
import triton

from ..backends.triton import launch
from ..tuning.calls import Size
from ..tuning.config import Problem, Target, TileConfig, one_line
from ..tuning.fingerprint import gluon_fingerprint
from ..tuning.lookup import config_for
from ..tuning.table import Entry, EntryKey
from .candidates import candidates, in_gluon, neighbours, shares
from .gate import Compiler, compiler_versions
from .timing import Contestant, Timing, card_state, median_ratio, take_turns
from .workload import Workload

# Another order or split replaces the default only where its rounds take at most this share of the default's time.
_CLEARLY_AHEAD = 0.97


@dataclass(frozen=True)
class Effort:
    """Sizes of a search: rounds of all configs, finalists and their rounds, seconds of warming up, configs compiled."""

    first_rounds: int = 5
    timed: int = 6
    rounds: int = 20
    warm_up: float = 0.2
    compiled: Callable[[str, Problem, Target], list[TileConfig]] = candidates


QUICK = Effort(first_rounds=3, timed=3, rounds=8, warm_up=0.05, compiled=neighbours)


class SearchError(Exception):
    """An error after which this process can search for nothing more on this machine."""


@dataclass(frozen=True)
class Result:
    """The result of a key's search; entry is None where no config passed, or none gave the reference's result."""

    key: EntryKey
    before: TileConfig
    before_timing: Timing | None
    entry: Entry | None
    timing: Timing | None
    wrong: tuple[str, ...] = ()

    @property
    def gain(self) -> float | None:
        """Time of the config in use over that of the new one."""
        if self.timing is None or self.before_timing is None:
            return None
        return self.before_timing.median / self.timing.median


def search(
    key: EntryKey,
    configs: list[TileConfig],
    target: Target,
    device: torch.device,
    effort: Effort,
    size: Size,
    dtypes: tuple[torch.dtype, ...] = (torch.bfloat16,),
) -> Result:
    """Time configs for a key at a size, the one in use among them; check each against the reference, in every dtype.

    Where the card's memory does not hold the operands, the result says so. Raises SearchError where a config leaves the
    card unusable.
    """
    before = config_for(key.kernel, key.problem, target)
    try:
        problems = [replace(key.problem, dtype=dtype) for dtype in dtypes]
        workloads = [Workload(key.kernel, problem, size, device) for problem in problems]
        return _search(key, [before, *configs], workloads, device, effort)
    except torch.OutOfMemoryError as error:
        return Result(key, before, None, None, None, (f"{key}: {one_line(error)}",))
    except RuntimeError as error:
        _refuse_if_lost(f"{key}, while timed,", device, error)
        raise


def _search(
    key: EntryKey, configs: list[TileConfig], workloads: list[Workload], device: torch.device, effort: Effort
) -> Result:
    """Search among configs, the first of which is in use."""
    before, trial = configs[0], _Trial(key, workloads, device, effort)
    fastest = _sorted(trial.times(configs, effort.first_rounds))[: effort.timed]
    if not fastest:
        return Result(key, before, None, None, None, trial.wrong())
    taken = trial.times([before, *fastest], effort.rounds)
    best, *others = _sorted(taken)
    runners_up = [one.as_record() | {"milliseconds": round(statistics.median(taken[one]), 4)} for one in others[:3]]
    if found := shares(key, best):
        taken = trial.times([before, best, *found], effort.rounds)
        best = _clearly_ahead([one for one in (*found, best) if one in taken], taken)
    timing = Timing.of(taken[best])
    before_timing = Timing.of(taken[before]) if before in taken else None
    details = _details(workloads, device, timing) | {"runners_up": runners_up}
    if best.kernel == "gluon":
        details["gluon"] = gluon_fingerprint()
    entry = Entry(best, "measured", details)
    return Result(key, before, before_timing, entry, timing, trial.wrong())


@dataclass(frozen=True)
class _Trial:
    """Times a key's configs whose results are right. errors: by config, what is wrong with it, or None."""

    key: EntryKey
    workloads: list[Workload]
    device: torch.device
    effort: Effort
    errors: dict[TileConfig, str | None] = field(default_factory=dict)

    def times(self, configs: list[TileConfig], rounds: int) -> dict[TileConfig, list[float]]:
        """Milliseconds of each round, taken in turns, by config."""
        configs = list(dict.fromkeys(configs))
        for config in configs:
            if config not in self.errors:
                self.errors[config] = self._error(config)
        right = {str(n): config for n, config in enumerate(configs) if not self.errors[config]}
        if not right:
            return {}
        running = {name: self._contestant(config) for name, config in right.items()}
        taken = take_turns(running, self.device, rounds, self.effort.warm_up)
        return {right[name]: milliseconds for name, milliseconds in taken.items()}

    def _contestant(self, config: TileConfig) -> Contestant:
        """Make a call of the kernel in a config, once for each dtype."""

        def run(number: int) -> object:
            with launch.configured(self.key.kernel, config):
                return [workload(number) for workload in self.workloads]

        return run

    def _error(self, config: TileConfig) -> str | None:
        """Describe what is wrong with a config's results, or the exception that it raised; None if nothing is."""
        try:
            with launch.configured(self.key.kernel, config):
                return next(filter(None, (workload.error() for workload in self.workloads)), None)
        except Exception as error:  # a compiler or driver may raise anything; the config is refused
            _refuse_if_lost(f"{self.key} {config}", self.device, error)
            return one_line(error)

    def wrong(self) -> tuple[str, ...]:
        return tuple(f"{self.key} {config}: {error}" for config, error in self.errors.items() if error)


def _sorted(taken: dict[TileConfig, list[float]]) -> list[TileConfig]:
    return sorted(taken, key=lambda config: statistics.median(taken[config]))


def _clearly_ahead(configs: list[TileConfig], taken: dict[TileConfig, list[float]]) -> TileConfig:
    """Choose the first config, or the fastest where it leads the first clearly."""
    ratios = {config: median_ratio(taken[config], taken[configs[0]]) for config in configs}
    fastest = min(configs, key=ratios.__getitem__)
    return fastest if ratios[fastest] <= _CLEARLY_AHEAD else configs[0]


def passing(key: EntryKey, compiler: Compiler, effort: Effort) -> list[TileConfig]:
    """List the configs that pass the gate. Raises SearchError if none compiles."""
    asked = (key.kernel, key.problem, compiler.target)
    configs = [*effort.compiled(*asked), *in_gluon(*asked)]
    examined = compiler.examine([(key.kernel, key.problem, config) for config in configs])
    if all(one.code is None for one in examined):
        raise SearchError(f"{key}: no config compiles; {examined[0].config}: {'; '.join(examined[0].reasons)}")
    return [one.config for one in examined if not one.reasons]


def _refuse_if_lost(what: str, device: torch.device, error: Exception) -> None:
    """Raise SearchError where every call of a GPU fails from now on, as after an illegal address."""
    if device.type != "cuda":
        return
    try:
        torch.cuda.synchronize(device)
    except RuntimeError:
        raise SearchError(
            f"{what} left the card unusable to this process: {one_line(error)}; "
            "--kernels, --head-dims and --lengths name others"
        ) from error


def _details(workloads: list[Workload], device: torch.device, timing: Timing) -> dict[str, Any]:
    card = torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
    return {
        "card": card,
        "driver": card_state(device).get("driver_version", "unknown"),
        "torch": torch.__version__,
        **compiler_versions(Target.of(device)),
        "date": date.today().isoformat(),
        "size": workloads[0].size.as_record(),
        "dtypes": [str(workload.problem.dtype).removeprefix("torch.") for workload in workloads],
        "rounds": timing.rounds,
        "milliseconds": round(timing.median, 4),
        "quartiles": [round(timing.lower, 4), round(timing.upper, 4)],
    }


def pending(keys: Iterable[EntryKey], done: dict[EntryKey, Entry], effort: Effort) -> list[EntryKey]:
    """List the keys that this Triton has not measured in so many rounds, where a search that was stopped goes on."""

    def is_done(entry: Entry) -> bool:
        rounds = entry.details.get("rounds")
        is_recent = entry.source == "measured" and entry.details.get("triton") == triton.__version__
        return is_recent and isinstance(rounds, int) and rounds >= effort.rounds

    return [key for key in keys if key not in done or not is_done(done[key])]
