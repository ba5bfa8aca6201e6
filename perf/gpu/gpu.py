"""Run all measurements that need a GPU machine; results are saved as each phase ends.

Environment, a preflight, two stages against three, derivatives, compilation by all cores, then correctness on the card,
soak, bits of batch_invariant, forward and backward against peers, decoding, other head dims, tuning, FlashAttention
instead of the kernels, overhead of the scalings, sanitizers, report, whose tables have modelled milliseconds next to
the measured ones (`perf.models.modelled`). A preflight that fails ends the run, with what to do. Each later phase is a
process: one that fails, or leaves the card unusable, is reported, and the next one runs; one that this machine cannot
run is named, with the reason. The same command goes on where the last one was stopped. The exit status is 1 where a
phase failed, 130 after Ctrl-C. With --device emulate all phases are tiny, on a stub of NVIDIA's driver and an emulator:
a rehearsal.
"""

from __future__ import annotations

import argparse
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import torch

from tritonattn.cli.options import make_folder
from tritonattn.core.errors import INTERRUPTED
from tritonattn.core.provenance import commit

from ..soak import instrument, sanitize
from . import flash

ROOT = Path(__file__).resolve().parents[2]
_GRACE = 60.0  # most seconds past its share that a process has to start up and to finish its work
_SECONDS_TO_STOP = 20.0
_SECONDS_OF_BRIEF = 20.0  # in reserve for each phase without a share
_SUITES = {"ceilings": 2, "forward": 14, "backward": 12, "decode": 8, "dims": 3, "overhead": 6}  # with their shares
_UP = "time is up: "  # how a sweep or a count of cases begins the line that says what is left
_NOT_PASSED = r"\b(FAILED|ERROR) |/ \d+ errors?\b"  # of a test; of a file that pytest cannot import
_TINY_TUNE = ("--static", "sm_80", "--kernels", "decode", "--head-dims", "64", "--lengths", "short")
_TINY = ("--quick", "--lengths", "16", "--head-dims", "16", "--rounds", "1", "--dtypes", "bf16")
_TINY += ("--peers", "sdpa,eager,flash-attn-2")
_TINY_MODES = ("--scalings", "sqrt_dim,key_norm_mean")


@dataclass(frozen=True)
class Phase:
    """A command of Python.

    share    of the time left for this phase and later ones; 0: it is short, and runs even when time is up
    limit    the option that takes its minutes, or None
    failure  text of its log that means a failure, even if it was stopped before it could exit with an error: a regular
             expression, as is cut
    cut      text of its log that means an orderly end before all was done
    again    it runs in every run, though it was done in one before; others need not
    required nothing after it is worth its time where it fails
    obstacle why it cannot run on this machine, or None
    """

    name: str
    command: tuple[str, ...]
    share: float
    limit: str | None = None
    environment: dict[str, str] = field(default_factory=dict)
    failure: str | None = None
    cut: str | None = None
    again: bool = False
    required: bool = False
    obstacle: str | None = None


@dataclass(frozen=True)
class Outcome:
    """The end of a phase: "done", "done before", "left out", "failed" or "out of time"; what it finished is saved."""

    phase: Phase
    status: str
    seconds: float


def phases(device: str, out: Path, tests: str) -> list[Phase]:
    """List the phases of a GPU, or tiny ones that are emulated."""
    on_gpu = device == "cuda"
    tables = {"TRITONATTN_CACHE_DIR": str(out / "tables")}
    processes = () if on_gpu else ("--processes", "2")
    compiled = () if on_gpu else ("--target", "sm_80", "--calls", "2", *processes)
    trials = () if on_gpu else ("--trials", "2")
    cases = ("--backend", "cuda") if on_gpu else ("--backend", "sm_80", "--cases", "1")
    tune = ("--head-dims", "64,128", "--lengths", "long") if on_gpu else _TINY_TUNE

    def sweep(suite: str) -> Phase:
        tiny = () if on_gpu else (*_TINY, *(_TINY_MODES if suite != "ceilings" else ()))
        options = ("--device", device, "--json", str(out / f"{suite}.jsonl"), *tiny)
        command = ("-m", "perf", "sweep", "--suite", suite, *options)
        return Phase(suite, command, _SUITES[suite], "--minutes", tables, cut=_UP)

    files = [str(out / f"{suite}.jsonl") for suite in _SUITES]

    def of_perf(command: str, *options: str) -> tuple[str, ...]:
        return ("-m", "perf", command, *options)

    tested = ("--device", device, "--go-on", str(out / "passed.txt"), *processes)
    soaked = ("--device", device, "--go-on", str(out / "soak.txt"), *trials)
    flashed = of_perf("flash", "--device", device, "--write")
    return [
        Phase("environment", ("-m", "tritonattn", "env"), 0, None, tables, again=True),
        Phase("preflight", of_perf("preflight", "--device", device), 8, again=True, required=True),
        Phase("stages", of_perf("stages", "--device", device), 3),
        Phase("derivatives", of_perf("derivatives", "--device", device), 4, failure="kernels are wrong"),
        Phase("compile", of_perf("compile", *compiled), 6, "--minutes", again=True),
        sweep("ceilings"),
        Phase("correctness", of_perf("correctness", tests, *tested), 22, failure=_NOT_PASSED),
        Phase("soak", of_perf("soak", *soaked), 8, "--minutes", failure="repeat it: "),
        Phase("invariance", of_perf("invariance", *cases), 4, "--minutes", failure="DIFFER ", cut=_UP),
        *(sweep(suite) for suite in ("forward", "backward", "decode", "dims")),
        Phase("tuning", ("-m", "tritonattn", "tune", *tune), 10, "--budget", tables, cut=" is spent: run the command"),
        Phase("flash", flashed, 5, "--minutes", tables, obstacle=flash.obstacle(device)),
        sweep("overhead"),
        *(_instrumented(one, out) for one in instrument.INSTRUMENTS),
        *(_sanitized(tool) for tool in sanitize.TOOLS),
        Phase("report", of_perf("report", *files, "--out", str(out / "report.md")), 0, again=True),
        Phase("plots", of_perf("plot", *files, "--out", str(out / "plots")), 0, again=True),
    ]


def _instrumented(name: str, out: Path) -> Phase:
    """A short soak of kernels with one of Triton's sanitizers in them."""
    options = ("--device", "cuda", "--bare", "--instrument", name, "--go-on", str(out / f"{name}.txt"))
    command = ("-m", "perf", "soak", *options)
    return Phase(name, command, 2, "--minutes", failure="repeat it: ", obstacle=instrument.obstacle(name))


def _sanitized(tool: str) -> Phase:
    """A short soak under one of compute-sanitizer's tools."""
    command = ("-m", "perf", "sanitize", "--tools", tool)
    return Phase(tool, command, 2, "--minutes", failure=sanitize.FINDING, obstacle=sanitize.obstacle())


def budget(chosen: list[Phase], minutes: float) -> dict[str, float]:
    """Minutes of each phase that has a share, where every phase takes all that it may."""
    chosen = [one for one in chosen if one.obstacle is None]
    seconds = 60 * minutes - _SECONDS_TO_STOP - _SECONDS_OF_BRIEF * sum(one.share == 0 for one in chosen)
    total = sum(one.share for one in chosen)
    return {one.name: round(seconds * one.share / total / 60, 1) for one in chosen if one.share}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--minutes", type=float, required=True, metavar="N", help="for all of it, report and plots too")
    parser.add_argument(
        "--out",
        type=Path,
        default=ROOT / "perf" / "results" / "gpu",
        metavar="DIR",
        help="results, logs, tuned tables, plots (default: perf/results/gpu)",
    )
    parser.add_argument("--device", choices=("cuda", "emulate"), default="cuda")
    parser.add_argument("--phases", type=lambda text: text.split(","), metavar="A,B", help="run these alone")
    parser.add_argument("--tests", metavar="PATH", help="what pytest runs; default: tests/kernels, emulated a part")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> None:
    """Run the phases, print how each ended, and exit with an error where one failed."""
    if arguments.device == "cuda" and not torch.cuda.is_available():
        sys.exit("gpu: device cuda: torch finds no GPU; --device emulate rehearses")
    few = "tests/kernels" if arguments.device == "cuda" else "tests/kernels/test_key_statistics.py"
    chosen = phases(arguments.device, arguments.out.resolve(), arguments.tests or few)
    known = [phase.name for phase in chosen]
    for name in arguments.phases or ():
        if name not in known:
            sys.exit(f"gpu: --phases: expected some of {', '.join(known)}, got {name!r}")
    chosen = [phase for phase in chosen if arguments.phases is None or phase.name in arguments.phases]
    make_folder("--out", arguments.out)
    try:
        with _handling(signal.SIGTERM):  # sent by `timeout`; a phase must not outlive the run
            outcomes = run_all(chosen, arguments.out.resolve(), 60 * arguments.minutes)
    except KeyboardInterrupt:
        print(f"gpu: stopped: {arguments.out} has what was done; the same command goes on", file=sys.stderr)
        sys.exit(INTERRUPTED)
    failed = [outcome.phase.name for outcome in outcomes if outcome.status == "failed"]
    if failed:
        sys.exit(f"gpu: {', '.join(failed)} failed: see the logs in {arguments.out}")


def run_all(chosen: list[Phase], out: Path, seconds: float) -> list[Outcome]:
    """Run every phase within `seconds` in all; time that one leaves over is shared among later ones.

    Phases that a run at this commit has done, and those with an obstacle, do not run. A required one that fails is the
    last.
    """
    end = time.monotonic() + seconds
    done = _Done(out / "done.txt")
    outcomes = [outcome for phase in chosen if (outcome := _without_a_run(phase, done, out))]
    chosen = [phase for phase in chosen if phase not in [outcome.phase for outcome in outcomes]]
    for number, phase in enumerate(chosen):
        later = chosen[number:]
        kept = _SECONDS_TO_STOP + _SECONDS_OF_BRIEF * sum(one.share == 0 for one in later)
        left = end - time.monotonic() - kept
        if phase.share == 0:
            outcomes.append(execute(phase, out, 0.0, _GRACE))
        elif left > 0:
            grace = min(_GRACE, left / 4)
            outcomes.append(execute(phase, out, (left - grace) * phase.share / sum(one.share for one in later), grace))
        else:
            outcomes.append(Outcome(phase, "out of time", 0.0))
        last = outcomes[-1]
        _note(out, f"{phase.name}: {last.status} after {last.seconds:.0f} s (log: {out / phase.name}.log)")
        if last.status == "done" and not phase.again:
            done.add(phase.name)
        if last.status == "failed" and phase.required:
            print((out / f"{phase.name}.log").read_text(encoding="utf-8").strip().splitlines()[-1], file=sys.stderr)
            break
    return outcomes


def _without_a_run(phase: Phase, done: _Done, out: Path) -> Outcome | None:
    if phase.obstacle is not None:
        _note(out, f"{phase.name}: left out: {phase.obstacle}")
        return Outcome(phase, "left out", 0.0)
    if phase.name in done.names:
        print(f"{phase.name}: done before", flush=True)
        return Outcome(phase, "done before", 0.0)
    return None


def _note(out: Path, line: str) -> None:
    """Print how a phase ended, and keep it."""
    print(line, flush=True)
    with (out / "phases.txt").open("a", encoding="utf-8") as file:
        file.write(line + "\n")


class _Done:
    """The names of phases that runs at this commit have done, in a file."""

    def __init__(self, file: Path) -> None:
        lines = file.read_text(encoding="utf-8").splitlines() if file.is_file() else []
        self.file, self.commit = file, commit()
        self.names = set(lines[1:]) if lines[:1] == [self.commit] else set()

    def add(self, name: str) -> None:
        self.names.add(name)
        self.file.write_text("\n".join([self.commit, *sorted(self.names)]) + "\n", encoding="utf-8")


def execute(phase: Phase, out: Path, seconds: float, grace: float) -> Outcome:
    """Run a phase's process for `seconds`, its output in a file; stop it after the grace."""
    command = [sys.executable, *phase.command]
    if phase.limit is not None:
        command += [phase.limit, f"{seconds / 60:.2f}"]
    start, file = time.monotonic(), out / f"{phase.name}.log"
    with file.open("w", encoding="utf-8") as log:
        print("$", *command, file=log, flush=True)
        with _handling(signal.SIGINT):  # a shell makes background processes ignore it
            process = subprocess.Popen(
                command,
                cwd=ROOT,
                env=os.environ | phase.environment,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        try:
            failed = process.wait(seconds + grace) != 0
            status = "failed" if failed else "out of time" if _says(file, phase.cut) else "done"
        except subprocess.TimeoutExpired:
            _stop(process)
            status = "failed" if _says(file, phase.failure) else "out of time"
        except KeyboardInterrupt:
            _stop(process)
            raise
    return Outcome(phase, status, time.monotonic() - start)


def _says(log: Path, text: str | None) -> bool:
    said = log.read_text(encoding="utf-8", errors="replace")
    return text is not None and re.search(text, said, re.MULTILINE) is not None


@contextmanager
def _handling(number: signal.Signals) -> Iterator[None]:
    """Make a signal raise KeyboardInterrupt here; processes started inside have its default action."""
    before = signal.signal(number, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(number, before)


def _stop(process: subprocess.Popen) -> None:
    """Interrupt a process as Ctrl-C does, so that it ends in order; then kill it with all that it started."""
    os.killpg(process.pid, signal.SIGINT)
    try:
        process.wait(_SECONDS_TO_STOP)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
