"""`python -m tests.mutants [WORD ...]`: every fault, or those whose name, file or function holds one of the words.

A fault is caught if an assertion of its test fails. It is missed if the test passes, raises another error or hangs.
"""

import argparse
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from queue import SimpleQueue

from .runner import Runner, started
from .table import Mutant, read_table


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.mutants", description=__doc__)
    parser.add_argument("words", nargs="*", help="of names, files or functions")
    parser.add_argument("--jobs", type=int, default=2, help="faults at a time (default: 2)")
    parser.add_argument("--verbose", action="store_true", help="show the output of tests that catch nothing")
    options = parser.parse_args()
    mutants, missed = [one for one in read_table() if _is_asked(one, options.words)], 0
    for interpreted in (True, False):
        if alike := [mutant for mutant in mutants if mutant.is_interpreted == interpreted]:
            missed += _count_missed(alike, options.jobs, options.verbose)
    print(f"{len(mutants) - missed} of {len(mutants)} faults caught")
    return int(missed > 0)


def _is_asked(mutant: Mutant, words: list[str]) -> bool:
    return not words or any(word in f"{mutant.where}: {mutant.name}" for word in words)


def _count_missed(mutants: Sequence[Mutant], jobs: int, verbose: bool) -> int:
    """Print a line for each of the faults, whose tests are all interpreted or all not; how many were missed."""
    with ExitStack() as stack, ThreadPoolExecutor(jobs) as pool:
        runners = [stack.enter_context(started(mutants[0].is_interpreted)) for _ in range(min(jobs, len(mutants)))]
        if said := runners[0].why_sound_fails(mutants):
            print(f"the tests fail without a fault:\n{said}")
            raise SystemExit(1)
        free: SimpleQueue[Runner] = SimpleQueue()
        for runner in runners:
            free.put(runner)

        def is_missed(mutant: Mutant) -> bool:
            runner, start = free.get(), time.perf_counter()
            try:
                said = runner.why_not_caught(mutant)
            finally:
                free.put(runner)
            verdict, seconds = "caught" if said is None else "MISSED", time.perf_counter() - start
            print(f"{verdict} {seconds:5.1f} s  {mutant.where}: {mutant.name}", flush=True)
            if said is not None and verbose:
                print(said, flush=True)
            return said is not None

        return sum(pool.map(is_missed, mutants))


if __name__ == "__main__":
    sys.exit(main())
