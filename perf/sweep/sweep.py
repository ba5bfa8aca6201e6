"""Time every suite's cases, check each result against float64, and write records as JSON lines.

A case that the file has from the same command and commit is not run again: after Ctrl-C the same command goes on. The
exit status is 1 where a result is wrong or our code fails, else 130 after Ctrl-C. Peers that are skipped, or that pass
the bound themselves, are named with reasons and not timed.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

from tritonattn.cli.options import check_file, names, whole_number, whole_numbers
from tritonattn.core.errors import INTERRUPTED

from ..options import command_line

_DEVICES = (
    "default: a GPU where there is one. For errors, not times: interpret, kernels in Triton's interpreter; emulate, "
    "kernels compiled for sm_80, launched on a stub of NVIDIA's driver and run in tests/emulator, bf16 as on a GPU"
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    suites = (
        "forward,backward,dims,decode,varlen,overhead,accuracy,scaling,cpu,forms,ceilings; default: all of a device"
    )
    parser.add_argument("--suite", type=names, metavar="A,B", help=suites)
    parser.add_argument("--device", choices=("cuda", "cpu", "interpret", "emulate"), help=_DEVICES)
    parser.add_argument("--only", metavar="TEXT", help="of the suites' cases those of whose axes one holds this text")
    parser.add_argument("--peers", type=names, help="sdpa,flex,...: implementations to run next to ours, or none")
    parser.add_argument("--quick", action="store_true", help="run few small cases and rounds, to see that it works")
    parser.add_argument("--lengths", type=whole_numbers, help="1024,2048,...: queries and keys, keys of a cache, ...")
    parser.add_argument("--head-dims", type=whole_numbers, help="64,128,...")
    parser.add_argument("--dtypes", type=names, help="fp32,fp16,bf16")
    parser.add_argument("--scalings", type=names, help="sqrt_dim,key_norm_mean,...")
    parser.add_argument("--rounds", type=whole_number, help="most rounds of a case (default: 25)")
    parser.add_argument("--threads", type=whole_number, help="threads of torch on a CPU")
    parser.add_argument("--minutes", type=float, help="begin no case after so many minutes")
    parser.add_argument("--json", type=Path, metavar="FILE", help="append records to this file")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> None:
    """Measure, print the tables, and exit with an error where something was wrong."""
    if options.device == "interpret":
        os.environ["TRITON_INTERPRET"] = "1"  # before anything imports the kernels
    import torch

    from ..devices import kernels_on, obstacle

    name = options.device or ("cuda" if torch.cuda.is_available() else "cpu")
    if name != "cpu" and (reason := obstacle(name)):
        sys.exit(f"sweep: {reason}")
    check_file("--json", options.json)
    if options.threads:
        torch.set_num_threads(options.threads)
    from .report import tables
    from .run import measure

    command = command_line("sweep", options)
    options.device = name
    with kernels_on(name):
        records, stopped = measure(options, command)
    print(tables(records))
    bad = [record for record in records if record.is_bad]
    if bad:
        lines = [f"{record.suite} {record.case}, {record.contestant}: {record.reason}" for record in bad]
        sys.exit("\n".join([f"sweep: {len(bad)} results are wrong or missing", *lines]))
    if stopped:
        sys.exit(INTERRUPTED)
