"""`python -m tests.mutants [WORD ...]`: every fault, or those whose name or file holds one of the words."""

import argparse
import sys
import time
from concurrent.futures import ThreadPoolExecutor

from .runner import why_not_caught, why_sound_fails
from .table import Mutant, read_table


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.mutants", description=__doc__)
    parser.add_argument("words", nargs="*", help="of names or files")
    parser.add_argument("--jobs", type=int, default=2, help="faults at a time (default: 2)")
    parser.add_argument("--verbose", action="store_true", help="show the output of tests that catch nothing")
    options = parser.parse_args()
    mutants = [one for one in read_table() if _is_asked(one, options.words)]
    if said := why_sound_fails(mutants):
        print(f"the tests fail without a fault:\n{said}")
        return 1
    with ThreadPoolExecutor(options.jobs) as pool:
        missed = sum(pool.map(lambda mutant: _report(mutant, options.verbose), mutants))
    print(f"{len(mutants) - missed} of {len(mutants)} faults caught")
    return int(missed > 0)


def _is_asked(mutant: Mutant, words: list[str]) -> bool:
    return not words or any(word in mutant.name or word in mutant.file for word in words)


def _report(mutant: Mutant, verbose: bool) -> bool:
    """Print a line; whether the fault was missed."""
    start = time.perf_counter()
    said = why_not_caught(mutant)
    seconds = time.perf_counter() - start
    verdict = "caught" if said is None else "MISSED"
    print(f"{verdict} {seconds:5.1f} s  {mutant.file}: {mutant.name}", flush=True)
    if said is not None and verbose:
        print(said, flush=True)
    return said is not None


if __name__ == "__main__":
    sys.exit(main())
