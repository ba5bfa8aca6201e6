"""`python -m perf <benchmark>`."""

from __future__ import annotations

import argparse

from . import codegen, cpu


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m perf", description=__doc__)
    benchmarks = parser.add_subparsers(required=True, metavar="benchmark")
    cpu.add_arguments(benchmarks.add_parser("cpu", help=cpu.__doc__, description=cpu.__doc__))
    codegen.add_arguments(benchmarks.add_parser("codegen", help=codegen.__doc__, description=codegen.__doc__))
    arguments = parser.parse_args()
    arguments.run(arguments)


if __name__ == "__main__":
    main()
