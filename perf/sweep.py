"""Time every suite's cases, check each result against float64, and write records as JSON lines.

A case whose records the file has, from the same command and commit, is not run again: after Ctrl-C the same command
goes on. The exit status is 1 where a result is wrong or our code fails, else 130 after Ctrl-C; peers that are skipped,
or whose own error passes the bound, are named, with reasons, and not timed.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from pathlib import Path

from tritonattn.core.command import INTERRUPTED, check_file, whole_number, whole_numbers

_ROUNDS, _QUICK_ROUNDS = 25, 3
_SECONDS = 20.0  # of rounds a case
_DEVICES = (
    "default: a GPU where there is one. For errors, not times: interpret, kernels in Triton's interpreter; emulate, "
    "kernels compiled for sm_80 in the emulator of tests/emulator, in 16 bits as a GPU computes them"
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    suites = "forward,backward,decode,varlen,overhead,accuracy,scaling,cpu,ceilings; default: all that suit the device"
    parser.add_argument("--suite", type=_names, metavar="A,B", help=suites)
    parser.add_argument("--device", choices=("cuda", "cpu", "interpret", "emulate"), help=_DEVICES)
    parser.add_argument("--peers", type=_names, help="sdpa,flex,...: who runs beside ours; none for nobody")
    parser.add_argument("--quick", action="store_true", help="few small cases and rounds: whether all of it runs")
    parser.add_argument("--lengths", type=whole_numbers, help="1024,2048,...: queries and keys, keys of a cache, ...")
    parser.add_argument("--head-dims", type=whole_numbers, help="64,128,...")
    parser.add_argument("--dtypes", type=_names, help="fp32,fp16,bf16")
    parser.add_argument("--scalings", type=_names, help="sqrt_dim,key_norm_mean,...")
    parser.add_argument("--rounds", type=whole_number, help=f"most rounds of a case (default: {_ROUNDS})")
    parser.add_argument("--threads", type=whole_number, help="of torch on a CPU")
    parser.add_argument("--minutes", type=float, help="begin no case after so long")
    parser.add_argument("--json", type=Path, metavar="FILE", help="append records to this file")
    parser.set_defaults(run=run)


def _names(text: str) -> tuple[str, ...]:
    return tuple(name.strip() for name in text.split(",") if name.strip())


def run(arguments: argparse.Namespace) -> None:
    """Measure, print the tables, and exit with an error where something was wrong."""
    if arguments.device == "interpret":
        os.environ["TRITON_INTERPRET"] = "1"  # before anything imports the kernels
    import torch

    from tritonattn.backends.triton import launch

    kind = arguments.device or ("cuda" if torch.cuda.is_available() else "cpu")
    if kind == "cuda" and not torch.cuda.is_available():
        sys.exit("sweep: device cuda: torch sees no GPU")
    if kind == "emulate":
        from tests.emulated.executor import GPU, Executor

        launch.run = Executor(GPU(80))  # whose configs CPU tensors take
    if kind == "interpret" and not launch.runs_on(torch.device("cpu")):
        sys.exit("sweep: device interpret: set TRITON_INTERPRET=1 in the environment")
    check_file("--json", arguments.json)
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    from .report import tables
    from .run_suites import measure

    request = _request(arguments, kind)
    records, stopped = measure(request)
    print(tables(records))
    bad = [record for record in records if record.is_bad]
    if bad:
        lines = [f"{record.suite} {record.case}, {record.contestant}: {record.reason}" for record in bad]
        sys.exit("\n".join([f"sweep: {len(bad)} results are wrong or missing", *lines]))
    if stopped:
        sys.exit(INTERRUPTED)


def command_line(arguments: argparse.Namespace) -> str:
    """The command that measures the same: every option but the file and the time limit."""
    words = ["python -m perf sweep"]
    for name, value in vars(arguments).items():
        if name in ("run", "json", "minutes") or value in (None, False):
            continue
        option = f"--{name.replace('_', '-')}"
        if value is True:
            words.append(option)
        else:
            words.append(f"{option} {','.join(map(str, value)) if isinstance(value, tuple) else value}")
    return " ".join(words)


def _request(arguments: argparse.Namespace, kind: str):
    from .contest import Effort
    from .run_suites import Request

    rounds = arguments.rounds or (_QUICK_ROUNDS if arguments.quick else _ROUNDS)
    limit = None if arguments.minutes is None else time.monotonic() + 60 * arguments.minutes
    return Request(
        suites=arguments.suite,
        kind=kind,
        quick=arguments.quick,
        axes={
            "peers": arguments.peers,
            "lengths": arguments.lengths,
            "head_dims": arguments.head_dims,
            "dtypes": arguments.dtypes,
            "scalings": arguments.scalings,
        },
        effort=Effort(rounds, 1.0 if arguments.quick else _SECONDS, 0.0 if arguments.quick else 0.3),
        command=command_line(arguments),
        json=arguments.json,
        deadline=limit,
    )
