"""Tests of the kernels in several processes of pytest, since most of their time on a GPU goes to compiling."""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from contextlib import ExitStack
from pathlib import Path
from threading import Thread

import pytest

from tritonattn.cli.options import whole_number
from tritonattn.cli.threads import usable_cores
from tritonattn.core.provenance import commit

from ..devices import kernels_on

_MOST = 16  # processes, each with a context on the card
_NO_TESTS = 5  # pytest's exit status for a process without tests


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("tests", nargs="*", default=["tests/kernels"], help="what pytest is given")
    parser.add_argument("--processes", type=whole_number, default=min(_MOST, usable_cores()))
    parser.add_argument(
        "--go-on", type=Path, metavar="FILE", help="skip the tests that this file has; add those that pass"
    )
    parser.add_argument("--device", choices=("cuda", "emulate"), default="cuda", help="emulate: on a stub driver")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> None:
    """Print the lines of all processes as they come, and exit with an error where one failed, or no test ran."""
    shares = [f"{n}/{arguments.processes}" for n in range(arguments.processes)]
    before = _passed_before(arguments.go_on)
    processes = [_begun(arguments, share) for share in shares]
    passed: list[str] = []
    threads = [Thread(target=_relay, args=(process, passed, arguments.go_on)) for process in processes]
    for thread in threads:
        thread.start()
    try:
        for thread in threads:
            thread.join()
    finally:  # Ctrl-C reached the processes as well; they end in order
        for thread in threads:
            thread.join()
        statuses = [process.wait() for process in processes]
    if any(status not in (0, _NO_TESTS) for status in statuses) or (set(statuses) == {_NO_TESTS} and not before):
        sys.exit(f"correctness: exit statuses of pytest: {', '.join(map(str, statuses))}")
    if before:
        print(f"{len(before)} tests had passed before, {len(passed)} have now")
    if not passed and not before:
        sys.exit("correctness: expected tests that pass, got only ones that were skipped: the kernels' want a GPU")


def _passed_before(file: Path | None) -> set[str]:
    """Read the tests that passed at this commit; a file of another commit is begun again."""
    if file is None:
        return set()
    first, *names = file.read_text(encoding="utf-8").splitlines() if file.is_file() else [""]
    if first != commit():
        file.write_text(f"{commit()}\n", encoding="utf-8")
        return set()
    return set(names)


def _begun(arguments: argparse.Namespace, share: str) -> subprocess.Popen:
    """Start pytest with one line a result, so that failures show though time runs out; warnings do not fail."""
    options = ["-v", "-W", "default", "-p", "no:cacheprovider", "--continue-on-collection-errors"]
    options += ["-p", __name__, "--share", share, "--kernels-on", arguments.device]
    if arguments.go_on:
        options += ["--passed-before", str(arguments.go_on)]
    return subprocess.Popen(
        [sys.executable, "-m", "pytest", *options, *arguments.tests],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=os.environ | {"PYTHONUNBUFFERED": "1"},
    )


def _relay(process: subprocess.Popen, passed: list[str], file: Path | None) -> None:
    """Print the lines, and keep the tests that passed."""
    assert process.stdout is not None
    with process.stdout as lines:
        for line in lines:
            sys.stdout.write(line)
            sys.stdout.flush()
            if " PASSED" in line:
                passed.append(line.partition(" PASSED")[0])
                if file is not None:
                    with file.open("a", encoding="utf-8") as lines_of_file:
                        lines_of_file.write(f"{passed[-1]}\n")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--share", default="0/1", help="n/m: of every m tests the one at position n")
    parser.addoption("--kernels-on", default="cuda", help="emulate: on a stub driver")
    parser.addoption("--passed-before", type=Path, help="a file with tests that need not run")


_kernels = ExitStack()


def pytest_sessionstart(session: pytest.Session) -> None:
    _kernels.enter_context(kernels_on(session.config.getoption("--kernels-on")))


def pytest_sessionfinish() -> None:
    _kernels.close()


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Keep every m-th test, so that all files come early in each process."""
    position, count = map(int, config.getoption("--share").split("/"))
    file = config.getoption("--passed-before")
    before = set(file.read_text(encoding="utf-8").splitlines()) if file else set()
    items[:] = [item for item in items[position::count] if item.nodeid not in before]
