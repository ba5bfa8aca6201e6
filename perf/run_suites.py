"""From what is asked for to records: cases in order, each kept as soon as it is done."""

from __future__ import annotations

import gc
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from tritonattn.tuner.progress import tqdm

from . import roofline
from .accuracy import AccuracyCase
from .attention_cases import DTYPES
from .contest import Contest, Effort
from .peers import PEERS
from .records import Record, ResultsFile
from .suites import MODES, SUITES, Place
from .versions import Environment


@dataclass(frozen=True)
class Request:
    """What `python -m perf sweep` is asked for.

    suites     names of SUITES, None for all that make sense on the device
    axes       fields of Axes that replace a suite's own, where they are not None
    deadline   of time.monotonic(), after which no case begins
    """

    suites: tuple[str, ...] | None
    kind: str
    quick: bool
    axes: dict[str, tuple | None]
    effort: Effort
    command: str
    json: Path | None = None
    deadline: float | None = None


def measure(request: Request) -> tuple[list[Record], bool]:
    """The records of all cases asked for, those that the file had included, and whether Ctrl-C ended it before."""
    place = Place(request.kind)
    plan = planned(request, place)
    file = ResultsFile(request.json, Environment.of(place.device, request.command))
    todo = [case for case in plan if not file.has(case.suite, case.axes)]
    if len(todo) < len(plan):
        print(f"{len(plan) - len(todo)} of {len(plan)} cases are in {request.json} already", file=sys.stderr)
    going_on = "the same command goes on" if request.json else "the same command would go on, had it --json FILE"
    try:
        with tqdm(total=len(todo), unit="case") as progress:
            for number, case in enumerate(todo):
                if request.deadline is not None and time.monotonic() > request.deadline:
                    print(f"time is up: {len(todo) - number} cases are left; {going_on}", file=sys.stderr)
                    break
                progress.set_postfix_str(f"{case.suite} {' '.join(map(str, case.axes.values()))}")
                file.append(case.run(request.effort, file.environment))
                _free(place.device)
                progress.update()
    except KeyboardInterrupt:
        print(f"stopped: {going_on}", file=sys.stderr)
        return file.records, True
    return file.records, False


def planned(request: Request, place: Place) -> list[Contest | AccuracyCase]:
    """Ceilings first, then the suites' cases. SystemExit for a name that is none."""
    names = request.suites or tuple(name for name in SUITES if name != "cpu" or place.kind == "cpu")
    _check_names("--suite", names, SUITES)
    wanted = {name: value for name, value in request.axes.items() if value is not None}
    wanted = {name: () if value == ("none",) else value for name, value in wanted.items()}
    for option, known in (("peers", PEERS), ("dtypes", DTYPES), ("scalings", MODES)):
        _check_names(f"--{option}", wanted.get(option, ()), known)
    axes = {name: replace(SUITES[name].chosen(place, request.quick), **wanted) for name in names}
    dtypes = tuple(dict.fromkeys(dtype for one in axes.values() for dtype in one.dtypes))
    cases: list[Contest | AccuracyCase] = list(roofline.contests(dtypes, place.device, request.quick))
    for name in names:
        cases += SUITES[name].contests(axes[name], place)
    return cases


def _check_names(option: str, names, known) -> None:
    for name in names:
        if name not in known:
            sys.exit(f"sweep: {option}: expected some of {', '.join(known)}, got {name!r}")


def _free(device: torch.device) -> None:
    """What autograd's graphs of the last case hold, before the next one is allocated."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
