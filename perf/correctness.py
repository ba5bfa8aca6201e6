"""Tests of the kernels in several processes of pytest, since most of their time on a GPU goes to compiling."""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from threading import Thread

import pytest

from tritonattn.cli.options import whole_number
from tritonattn.cli.threads import usable_cores

_MOST = 8  # processes, each with a context of its own on the card
_NO_TESTS = 5  # pytest's exit status for a process without tests


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("tests", nargs="*", default=["tests/kernels"], help="what pytest is given")
    parser.add_argument("--processes", type=whole_number, default=min(_MOST, usable_cores()))
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> None:
    """Print the lines of all processes as they come, and exit with an error where one failed, or no test ran."""
    processes = [_begun(arguments.tests, f"{n}/{arguments.processes}") for n in range(arguments.processes)]
    passed: list[str] = []
    threads = [Thread(target=_relay, args=(process, passed)) for process in processes]
    for thread in threads:
        thread.start()
    try:
        for thread in threads:
            thread.join()
    finally:  # Ctrl-C reached the processes as well; they end in order
        for thread in threads:
            thread.join()
        statuses = [process.wait() for process in processes]
    if any(status not in (0, _NO_TESTS) for status in statuses) or set(statuses) == {_NO_TESTS}:
        sys.exit(f"correctness: exit statuses of pytest: {', '.join(map(str, statuses))}")
    if not passed:
        sys.exit("correctness: expected tests that pass, got only ones that were skipped: the kernels' want a GPU")


def _begun(tests: list[str], share: str) -> subprocess.Popen:
    """Start pytest with one line a result, so that failures show though time runs out; warnings do not fail."""
    options = ["-v", "-W", "default", "-p", "no:cacheprovider", "--continue-on-collection-errors"]
    options += ["-p", __name__, "--share", share]
    return subprocess.Popen(
        [sys.executable, "-m", "pytest", *options, *tests],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=os.environ | {"PYTHONUNBUFFERED": "1"},
    )


def _relay(process: subprocess.Popen, passed: list[str]) -> None:
    """Print the lines, and keep those of tests that passed."""
    assert process.stdout is not None
    with process.stdout as lines:
        for line in lines:
            sys.stdout.write(line)
            sys.stdout.flush()
            if " PASSED" in line:
                passed.append(line)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--share", default="0/1", help="n/m: of every m tests the one at place n")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Keep every m-th test, so that all kinds of them come early in each process."""
    place, count = map(int, config.getoption("--share").split("/"))
    items[:] = items[place::count]
