"""Assemble the PTX of every default kernel by the ptxas of several CUDA releases, and set the results side by side.

Triton compiles each kernel once, for the oldest release, whose PTX the others take too; the same PTX then goes to each
ptxas, so that the columns differ by ptxas alone. Releases come from PyPI, by pip.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from itertools import chain
from multiprocessing import get_context
from pathlib import Path
from types import SimpleNamespace

import torch
import triton
from tabulate import tabulate

from tritonattn.backends.triton import KERNELS
from tritonattn.cli.options import check_file, numbers, whole_number
from tritonattn.cli.threads import usable_cores
from tritonattn.core.progress import Progress
from tritonattn.core.provenance import commit
from tritonattn.core.records import FIGURES
from tritonattn.tuning import Problem, compile_kernel
from tritonattn.tuning.config import WIDEST
from tritonattn.tuning.ptxas import suspicion

from .codegen import READ, Case, _targets, cases
from .static.machine_code import read_machine_code

RELEASES = ("12.8.93", "12.9.86", "13.0.88", "13.1.115", "13.5.37")

HEADING = """# The same PTX by the ptxas of several CUDA releases

Static: PTX of every kernel in its default config in bf16, compiled by triton {triton} at commit {commit},
assembled by each ptxas with `{options}`; nothing ran. `{command}`.

A cell has registers of a thread / bytes spilled inside loops / instructions of the kernel. Kernels on which all
releases agree are counted, not listed."""
_OPTIONS = ("-O3",)


@dataclass(frozen=True)
class Assembled:
    """A kernel by one release. error: the last line of ptxas where it failed, else ""."""

    kernel: str
    release: str
    registers: int = 0
    spill_bytes: int = 0
    stack_bytes: int = 0
    instructions: int = 0
    error: str = ""

    def __str__(self) -> str:
        return self.error or f"{self.registers} / {self.spill_bytes} / {self.instructions}"


def all_cases(targets: tuple[str, ...], head_dims: tuple[int, ...]) -> list[Case]:
    """The cases of `perf codegen`, and the kernels that it leaves out."""
    found = cases(targets, head_dims, torch.bfloat16)
    others = [kernel for kernel in KERNELS if kernel not in READ]
    problems = [(target, Problem(dim, dim, torch.bfloat16)) for target in targets for dim in head_dims]
    return found + [Case(kernel, target, problem) for target, problem in problems for kernel in others]


def fetched(release: str, folder: Path) -> Path:
    """The ptxas of a CUDA release such as "12.9.86", installed from PyPI into another folder."""
    package = "nvidia-cuda-nvcc-cu12" if release.startswith("12.") else "nvidia-cuda-nvcc"
    into = folder / release
    if not into.exists():
        install = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(into)]
        subprocess.run([*install, f"{package}=={release}"], check=True)
    return next(into.rglob("bin/ptxas"))


def assembled(case: Case, tools: dict[str, Path]) -> list[Assembled]:
    """Compile a case, and assemble its PTX by each tool."""
    compiled = compile_kernel(case.kernel, case.problem, target=case.target)
    ptx = compiled.asm["ptx"]
    target = next(line for line in ptx.split("\n") if line.startswith(".target ")).split()[1].rstrip(",")
    return [_by(tool, case.name, release, ptx, target, compiled.metadata) for release, tool in tools.items()]


def _by(tool: Path, name: str, release: str, ptx: str, target: str, metadata: object) -> Assembled:
    with tempfile.TemporaryDirectory() as folder:
        source, made = Path(folder) / "kernel.ptx", Path(folder) / "kernel.cubin"
        source.write_text(ptx, encoding="utf-8")
        command = [str(tool), *_OPTIONS, f"--gpu-name={target}", str(source), "-o", str(made)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode != 0:
            return Assembled(name, release, error=(done.stderr.strip().splitlines() or ["failed"])[-1])
        cubin = made.read_bytes()
    code = read_machine_code(SimpleNamespace(asm={"cubin": cubin, "ptx": ptx}, metadata=metadata))  # type: ignore
    return Assembled(name, release, code.registers, code.spill_bytes, code.stack_bytes, code.instructions)


def _start_worker(ptxas: str) -> None:
    """Let Triton write the PTX of this ptxas, for older and newer cards."""
    os.environ |= {"TRITON_PTXAS_PATH": ptxas, "TRITON_PTXAS_BLACKWELL_PATH": ptxas}


def table(rows: list[list[Assembled]]) -> str:
    """Kernels on which releases differ, in columns by release, and how many they agree on."""
    different = [row for row in rows if len({str(one) for one in row}) > 1]
    headers = ["kernel", *(one.release for one in rows[0])]
    body = tabulate([[row[0].kernel, *map(str, row)] for row in different], headers, "github", disable_numparse=True)
    return f"{body}\n\nAll releases agree on {len(rows) - len(different)} of {len(rows)} kernels."


def totals(rows: list[list[Assembled]]) -> str:
    """Each release over all kernels, with what is known against it."""
    lines = []
    for column in zip(*rows, strict=True):
        release = column[0].release
        worst = max(column, key=lambda one: one.registers)
        spilling = sum(one.spill_bytes > 0 for one in column)
        failed = sum(bool(one.error) for one in column)
        known = "known for wrong code" if suspicion(release) else ""
        sums = sum(one.registers for one in column), sum(one.instructions for one in column)
        lines.append([release, *sums, worst.registers, spilling, failed, known])
    headers = ["ptxas", "registers, sum", "instructions, sum", "most registers", "spill in loops", "failed", ""]
    return tabulate(lines, headers, "github", **FIGURES)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--releases", type=lambda text: text.split(","), default=RELEASES, help="12.9.86,...")
    parser.add_argument("--tools", type=Path, default=Path("ptxas"), metavar="DIR", help="where releases are installed")
    parser.add_argument("--targets", type=_targets, default=("sm_90", "sm_100"), help="sm_90,...")
    parser.add_argument("--head-dims", type=numbers(1, WIDEST), default=(64, 128), help="64,128,...")
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    parser.add_argument("--workers", type=whole_number, default=usable_cores(), help="processes")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> None:
    """Fetch, compile, assemble, print the tables; exit with an error where a ptxas refused a kernel."""
    check_file("--json", arguments.json)
    tools = {release: fetched(release, arguments.tools.resolve()) for release in arguments.releases}
    found = all_cases(arguments.targets, arguments.head_dims)
    oldest = str(min(tools.items(), key=lambda one: tuple(map(int, one[0].split("."))))[1])
    with ProcessPoolExecutor(arguments.workers, get_context("spawn"), _start_worker, (oldest,)) as pool:
        tasks = [pool.submit(assembled, case, tools) for case in found]
        rows = [task.result() for task in Progress(tasks, unit="kernel")]
    dims = ",".join(map(str, arguments.head_dims))
    options = f"--releases {','.join(tools)} --targets {','.join(arguments.targets)} --head-dims {dims}"
    facts = {"triton": triton.__version__, "commit": commit()}
    print(HEADING.format(**facts, options=" ".join(_OPTIONS), command=f"python -m perf ptxas {options}"))
    print(f"\n{totals(rows)}\n\n{table(rows)}")
    if arguments.json:
        records = [asdict(one) | facts for one in chain.from_iterable(rows)]
        arguments.json.write_text(json.dumps(records, indent=1) + "\n", encoding="utf-8")
    if failed := [f"{one.kernel} by {one.release}" for one in chain.from_iterable(rows) if one.error]:
        sys.exit(f"ptxas: refused: {', '.join(failed)}")
