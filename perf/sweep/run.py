"""Run the cases of a sweep in order, and keep the records of each as soon as it is done."""

from __future__ import annotations

import gc
import math
import sys
import time
from argparse import Namespace
from dataclasses import fields, replace

import torch

from tritonattn.core.progress import Progress
from tritonattn.core.provenance import Environment
from tritonattn.tuning.ptxas import ptxas_of

from ..cases import roofline
from ..cases.accuracy import AccuracyCase
from ..cases.attention import DTYPES
from ..cases.contest import Contest, Effort
from ..cases.peers import PACKAGES, PEERS
from ..cases.records import Record, ResultsFile
from .suites import MODES, SUITES, Axes, Machine

_ROUNDS, _QUICK_ROUNDS = 25, 3
_SECONDS = 20.0  # of rounds a case


def measure(options: Namespace, command: str) -> tuple[list[Record], bool]:
    """Run the cases that the options of a sweep ask for; options.device is the name of a Machine.

    Returns the records of all cases, those that the file had included, and whether Ctrl-C ended the sweep.
    """
    machine, effort = Machine(options.device), effort_of(options)
    deadline = math.inf if options.minutes is None else time.monotonic() + 60 * options.minutes
    plan = planned(options, machine)
    environment = Environment.of(machine.device, command, PACKAGES, ptxas_of(machine.device))
    file = ResultsFile(options.json, environment)
    todo = [case for case in plan if not file.has(case.suite, case.axes)]
    if len(todo) < len(plan):
        print(f"{len(plan) - len(todo)} of {len(plan)} cases are in {options.json} already", file=sys.stderr)
    going_on = "the same command goes on" if options.json else "the same command would go on, had it --json FILE"
    try:
        with Progress(total=len(todo), unit="case") as progress:
            for number, case in enumerate(todo):
                if time.monotonic() > deadline:
                    print(f"time is up: {len(todo) - number} cases are left; {going_on}", file=sys.stderr)
                    break
                progress.set_postfix_str(f"{case.suite} {' '.join(map(str, case.axes.values()))}")
                file.append(case.run(effort, file.environment))
                _free(machine.device)
                progress.update()
    except KeyboardInterrupt:
        print(f"stopped: {going_on}", file=sys.stderr)
        return file.records, True
    return file.records, False


def effort_of(options: Namespace) -> Effort:
    """Choose the rounds and seconds of a case."""
    if options.quick:
        return Effort(options.rounds or _QUICK_ROUNDS, seconds=1.0, warm_up=0.0)
    return Effort(options.rounds or _ROUNDS, seconds=_SECONDS, warm_up=0.3)


def planned(options: Namespace, machine: Machine) -> list[Contest | AccuracyCase]:
    """List the ceilings, then the suites' cases, or those that --only names. SystemExit for an unknown name.

    Options that are set replace the axes of the suites.
    """
    names = options.suite or tuple(name for name in SUITES if name not in ("cpu", "forms") or machine.name == "cpu")
    _check_names("--suite", names, SUITES)
    wanted = {axis.name: getattr(options, axis.name) for axis in fields(Axes)}
    wanted = {name: () if value == ("none",) else value for name, value in wanted.items() if value is not None}
    for option, known in (("peers", PEERS), ("dtypes", DTYPES), ("scalings", MODES)):
        _check_names(f"--{option}", wanted.get(option, ()), known)
    axes = {name: replace(SUITES[name].chosen(machine, options.quick), **wanted) for name in names}
    dtypes = tuple(dict.fromkeys(dtype for one in axes.values() for dtype in one.dtypes))
    cases: list[Contest | AccuracyCase] = list(roofline.contests(dtypes, machine.device, options.quick))
    for name in names:
        cases += SUITES[name].contests(axes[name], machine)
    if options.only is not None:
        cases = [case for case in cases if any(options.only in str(value) for value in case.axes.values())]
    if not cases:
        sys.exit(f"sweep: --only: expected text of an axis of a case, got {options.only!r}")
    return cases


def _check_names(option: str, names, known) -> None:
    for name in names:
        if name not in known:
            sys.exit(f"sweep: {option}: expected some of {', '.join(known)}, got {name!r}")


def _free(device: torch.device) -> None:
    """Free the memory of the last case, which autograd's graphs hold, before the next one is allocated."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
