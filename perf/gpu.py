"""Everything a GPU machine is needed for, the most useful first; results are saved as each phase ends.

Environment and ceilings, correctness on the card, soak, tuning, forward and backward against peers, decoding, overhead
of the scalings, report. A phase is a process of its own: one that fails, or leaves the card unusable, is reported, and
the next one runs. The exit status is 1 where one failed, 130 after Ctrl-C. With --device cpu all phases are tiny: a
rehearsal.
"""

from __future__ import annotations

import argparse
import os
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

ROOT = Path(__file__).resolve().parents[1]
_GRACE = 60.0  # most seconds past its share that a process has to start up and to finish its work
_SECONDS_TO_STOP = 20.0
_SECONDS_OF_BRIEF = 20.0  # in reserve for each phase without a share
_SUITES = {"ceilings": 2, "forward": 14, "backward": 14, "decode": 7, "overhead": 7}  # with their shares
_TINY_TUNE = ("--static", "sm_80", "--kernels", "decode", "--head-dims", "64", "--lengths", "short")
_TINY = ("--quick", "--lengths", "16", "--head-dims", "8", "--rounds", "1", "--peers", "sdpa,eager,flash-attn-2")


@dataclass(frozen=True)
class Phase:
    """A command of Python.

    share    of the time left for this phase and later ones; 0: it is short, and runs even when time is up
    limit    the option that takes its minutes, or None
    failure  text of its log that means a failure, even if it was stopped before it could exit with an error
    cut      text of its log that means an orderly end before all was done
    """

    name: str
    command: tuple[str, ...]
    share: float
    limit: str | None = None
    environment: dict[str, str] = field(default_factory=dict)
    failure: str | None = None
    cut: str | None = None


@dataclass(frozen=True)
class Outcome:
    """The end of a phase: "done", "failed" or "out of time", with its finished part saved."""

    phase: Phase
    status: str
    seconds: float


def phases(device: str, out: Path, tests: str) -> list[Phase]:
    """List the phases of a GPU, or tiny ones of a CPU with kernels in Triton's interpreter."""
    on_gpu = device == "cuda"
    tables = {"TRITONATTN_CACHE_DIR": str(out / "tables")}
    interpreted = {} if on_gpu else {"TRITON_INTERPRET": "1"}
    processes = () if on_gpu else ("--processes", "2")
    tune = ("--head-dims", "64,128", "--lengths", "long") if on_gpu else _TINY_TUNE

    def sweep(suite: str) -> Phase:
        options = ("--device", device, "--json", str(out / f"{suite}.jsonl"), *(() if on_gpu else _TINY))
        command = ("-m", "perf", "sweep", "--suite", suite, *options)
        return Phase(suite, command, _SUITES[suite], "--minutes", tables, cut="time is up: ")

    files = [str(out / f"{suite}.jsonl") for suite in _SUITES]
    return [
        Phase("environment", ("-m", "tritonattn", "env"), 0, None, tables),
        sweep("ceilings"),
        Phase("correctness", ("-m", "perf", "correctness", tests, *processes), 25, None, interpreted, " FAILED "),
        Phase("soak", ("-m", "perf", "soak", "--device", device), 8, "--minutes", interpreted, "repeat it: "),
        Phase(
            "tuning",
            ("-m", "tritonattn", "tune", *tune),
            20,
            "--budget",
            tables | {"TRITON_INTERPRET": "0"},
            cut=" is spent: run the command again",
        ),
        *(sweep(suite) for suite in _SUITES if suite != "ceilings"),
        Phase("report", ("-m", "perf", "report", *files, "--out", str(out / "report.md")), 0),
        Phase("plots", ("-m", "perf", "plot", *files, "--out", str(out / "plots")), 0),
    ]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--minutes", type=float, required=True, metavar="N", help="for all of it, report and plots too")
    parser.add_argument(
        "--out",
        type=Path,
        default=ROOT / "perf" / "results" / "gpu",
        metavar="DIR",
        help="results, logs, tuned tables, plots (default: perf/results/gpu)",
    )
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--phases", type=lambda text: text.split(","), metavar="A,B", help="run these alone")
    parser.add_argument("--tests", metavar="PATH", help="what pytest runs; default: tests/kernels, on a CPU a part")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> None:
    """Run the phases, print how each ended, and exit with an error where one failed."""
    if arguments.device == "cuda" and not torch.cuda.is_available():
        sys.exit("gpu: device cuda: torch sees no GPU; --device cpu rehearses")
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
        on = "the same command goes on with the sweeps"
        print(f"gpu: stopped: {arguments.out} has what was done; {on}", file=sys.stderr)
        sys.exit(INTERRUPTED)
    failed = [outcome.phase.name for outcome in outcomes if outcome.status == "failed"]
    if failed:
        sys.exit(f"gpu: {', '.join(failed)} failed: see the logs in {arguments.out}")


def run_all(chosen: list[Phase], out: Path, seconds: float) -> list[Outcome]:
    """Run every phase within `seconds` in all; time that one leaves over is shared among later ones."""
    end = time.monotonic() + seconds
    outcomes = []
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
        line = f"{phase.name}: {last.status} after {last.seconds:.0f} s (log: {out / phase.name}.log)"
        print(line, flush=True)
        with (out / "phases.txt").open("a", encoding="utf-8") as file:
            file.write(line + "\n")
    return outcomes


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
    return text is not None and text in log.read_text(encoding="utf-8", errors="replace")


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
