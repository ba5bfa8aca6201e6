"""Import the packages named as arguments; then fork a pytest for each line of stdin, and answer its exit status.

It runs in a copy of the checkout, of which it imports nothing itself: each pytest finds the files as they are by then.
"""

import gc
import importlib
import json
import os
import signal
import sys
from contextlib import suppress
from pathlib import Path

import pytest


def main() -> None:
    sys.path[0] = str(Path.cwd())  # as `python -m pytest` has it
    for name in sys.argv[1:]:
        importlib.import_module(name)
    gc.freeze()  # no pytest looks for garbage among them
    for line in sys.stdin:
        print(run_forked(**json.loads(line)), flush=True)


def run_forked(arguments: list[str], output: str, seconds: int) -> int:
    """The exit status of another pytest, which writes to a file; after so many seconds SIGALRM ends it."""
    child = os.fork()
    if child == 0:
        try:
            os.setsid()
            os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
            os.dup2(os.open(output, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), 1)
            os.dup2(1, 2)
            signal.alarm(seconds)
            status = pytest.main(arguments)
            sys.stdout.flush()
            os._exit(status)
        finally:
            os._exit(pytest.ExitCode.INTERNAL_ERROR)
    try:
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    finally:
        with suppress(ProcessLookupError):
            os.killpg(child, signal.SIGKILL)  # with the processes it has left


if __name__ == "__main__":
    with suppress(KeyboardInterrupt):
        main()
    os._exit(0)  # without taking apart what is imported
