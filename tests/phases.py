"""`python -m tests.phases [--workers N] [arguments of pytest]`: what `make test` runs, in three phases and one summary.

A phase that fails does not stop the next. Prints a table of the phases, then the reason of every skip, and exits
with 1 where a test or a phase failed, or where no phase ran a test.
"""

import argparse
import os
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import NamedTuple
from xml.etree import ElementTree

import torch
from tabulate import tabulate

NO_TESTS = 5  # pytest's exit status


class Phase(NamedTuple):
    """Arguments of pytest, and whether Triton's interpreter runs the kernels."""

    arguments: tuple[str, ...]
    is_interpreted: bool = False
    is_parallel: bool = True


# Tests in tests/distributed start processes of their own, and run alone.
PHASES = {
    "all but kernels": Phase(("--ignore=tests/kernels", "--ignore=tests/distributed", "--ignore=tests/slow")),
    "kernels": Phase(("tests/kernels",), is_interpreted=not torch.cuda.is_available()),
    "distributed": Phase(("tests/distributed",), is_parallel=False),
}


class Outcome(NamedTuple):
    """What pytest said of a phase, with a count for each reason of a skip."""

    status: int
    seconds: float
    passed: int
    failed: int
    skips: Counter[str]


def main() -> int:
    parser = argparse.ArgumentParser(usage=__doc__)
    parser.add_argument("--workers", default="2")
    options, arguments = parser.parse_known_args()
    outcomes = {name: run(phase, options.workers, arguments) for name, phase in PHASES.items()}
    print(summary(outcomes), flush=True)
    return exit_status(outcomes)


def run(phase: Phase, workers: str, arguments: list[str]) -> Outcome:
    """Run a phase to its end, with pytest's output on this terminal."""
    # One thread a worker: more would take the cores from one another. Neighbours share fixtures: they stay on a worker.
    environment = os.environ | {"OMP_NUM_THREADS": "1", "TRITON_INTERPRET": str(int(phase.is_interpreted))}
    if not os.access(Path.home(), os.W_OK):  # where Triton keeps what it compiled
        environment = {"TRITON_CACHE_DIR": str(Path.cwd() / ".triton")} | environment
    parallel = ["-n", workers, "--dist", "worksteal"] if phase.is_parallel else []
    with tempfile.TemporaryDirectory(prefix="tritonattn-tests-") as folder:
        report, start = Path(folder, "report.xml"), time.perf_counter()
        command = [sys.executable, "-m", "pytest", *parallel, *phase.arguments, f"--junitxml={report}", *arguments]
        status = subprocess.run(command, env=environment, check=False).returncode
        return read(report, status, time.perf_counter() - start)


def read(report: Path, status: int, seconds: float) -> Outcome:
    """Count the tests of a report in JUnit's form; a run that was cut short leaves none."""
    if not report.exists():
        return Outcome(status, seconds, 0, 0, Counter())
    cases = list(ElementTree.parse(report).iter("testcase"))
    failed = sum(case.find("failure") is not None or case.find("error") is not None for case in cases)
    skips = Counter(skip.get("message", "") for case in cases if (skip := case.find("skipped")) is not None)
    return Outcome(status, seconds, len(cases) - failed - skips.total(), failed, skips)


def summary(outcomes: dict[str, Outcome]) -> str:
    """The table of the phases, the reasons of skips, and the line of sums that ends a run."""
    headers = ("phase", "passed", "failed", "skipped", "seconds", "pytest's exit status")
    rows = [(name, x.passed, x.failed, x.skips.total(), round(x.seconds), x.status) for name, x in outcomes.items()]
    skips = sum((outcome.skips for outcome in outcomes.values()), Counter())
    reasons = "".join(f"\nskipped {count}: {reason}" for reason, count in skips.most_common())
    passed, failed, skipped = (sum(row[i] for row in rows) for i in (1, 2, 3))
    table = tabulate(rows, headers, tablefmt="simple")
    return f"\n{table}\n{reasons}\n{passed} passed, {failed} failed, {skipped} skipped"


def exit_status(outcomes: dict[str, Outcome]) -> int:
    """0 where every phase passed; arguments of pytest may leave some of them without a test."""
    statuses = {outcome.status for outcome in outcomes.values()}
    return int(statuses == {NO_TESTS} or not statuses <= {0, NO_TESTS})


if __name__ == "__main__":
    sys.exit(main())
