"""Read the machine code of every kernel, compiled for GPUs that need not be there."""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import statistics
import tempfile
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass
from itertools import product
from pathlib import Path

import torch
import triton
from tabulate import tabulate

from tritonattn.backends.triton import KERNELS
from tritonattn.cli.options import add_chosen, check_file, numbers, whole_number
from tritonattn.cli.threads import usable_cores
from tritonattn.core.progress import Progress
from tritonattn.core.provenance import commit
from tritonattn.tuning import Problem, Target, compile_kernel, default_config
from tritonattn.tuning.config import SECOND_KERNELS, STREAMING_KERNELS, TILED_KERNELS, WIDEST, TileConfig

from .ceilings import NON_MMA_PER_LOGIT, PAIR_BIASES
from .static.machine_code import CLASSES, MachineCode, flops_per_logit, read_machine_code
from .static.model import RATES, UNITS, cycles, programs_per_sm, utilisation

TARGETS = tuple(f"sm_{arch}" for arch in RATES)
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
READ = (*TILED_KERNELS, "key_statistics")
# Fields of Problem that are set: in full and causal calls, and in causal ones alone.
FORMS = ((), ("query_scale",), ("query_scale", "key_scale"))
BIASES = ("key_bias", "bias", "relative_bias")
CAUSAL_FORMS = (*(("query_scale", bias) for bias in BIASES), ("query_scale", "invariant"))
LETTERS = {"query_scale": "q", "key_scale": "k", "key_bias": "b", "bias": "d", "relative_bias": "r", "invariant": "i"}

HEADING = """# Generated code of every kernel in its default config, {dtype}

Static: read from the machine code that triton {triton} compiled at commit {commit}; nothing ran.

Tiles are query rows x keys. Stack and spills (local memory moved inside loops) are bytes of a thread, shared memory is
bytes of a block, TMEM columns. From "non-MMA" on: instructions per logit in the unmasked loop, first all but the MMAs,
then by class; ceilings are those of perf/models/ceilings.py. Modelled figures come from a card's rates
(perf/models/static/model.py), as if all units overlapped. AMD: registers, spills (of the whole kernel) and LDS only."""


@dataclass(frozen=True)
class Case:
    """A kernel of KERNELS to be compiled for a problem and a target, in the default config."""

    kernel: str
    target: str
    problem: Problem

    @property
    def name(self) -> str:
        problem = self.problem
        mask = "causal" if problem.right else "full"
        form = "".join(letter for field, letter in LETTERS.items() if getattr(problem, field)) or "none"
        return f"{self.kernel}_{self.target}_d{problem.head_dim}_{dtype_name(problem)}_{mask}_{form}"


@dataclass(frozen=True)
class Reading:
    """A row of the JSON file; None where the target's code is not read so far or the kernel has no MMA loop.

    form: the scales that are given, and batch_invariant. config: block_m query rows, block_n keys. Registers and bytes
    of a thread, but shared_bytes of a program and tensor_memory in columns. instructions: of the unmasked loop, by
    class, a logit. bounds: modelled clocks of an SM, by unit, a logit.
    """

    kernel: str
    target: str
    head_dim: int
    dtype: str
    causal: bool
    form: str
    config: dict[str, int]
    registers: int
    stack_bytes: int
    spill_bytes: int
    shared_bytes: int
    tensor_memory: int
    blocks_per_sm: int | None
    instructions: dict[str, float] | None
    non_mma_per_logit: float | None
    bounds: dict[str, float] | None
    modelled_utilisation: float | None
    cubin: str | None
    compile_seconds: float


def cases(
    targets: Sequence[str], head_dims: Sequence[int], dtype: torch.dtype, kernels: Sequence[str] = READ
) -> list[Case]:
    """Every kernel without scales, with query_scale, and that with key_scale, each bias and batch_invariant.

    Kernels that no batch_invariant call launches are read in causal calls alone, those of derivatives beyond the first
    in the forms that tables have: with query_scale, and that with key_scale.
    """
    found = []
    for target, head_dim, kernel in product(targets, head_dims, kernels):
        if kernel not in KERNELS or (kernel in SECOND_KERNELS and head_dim > 256):
            continue
        if kernel in STREAMING_KERNELS:
            found.append(Case(kernel, target, Problem(head_dim, head_dim, dtype)))
            continue
        forms = [*product((False, True), FORMS), *product((True,), CAUSAL_FORMS)]
        if kernel == "decode":  # batch_invariant calls do not launch it
            forms = [(causal, form) for causal, form in forms if causal and "invariant" not in form]
        if kernel in SECOND_KERNELS:
            forms = [(True, form) for form in FORMS[1:]]
        for causal, form in forms:
            problem = Problem(head_dim, head_dim, dtype, right=causal, **dict.fromkeys(form, True))
            found.append(Case(kernel, target, problem))
    return found


def read(case: Case, cubins: Path | None = None) -> Reading:
    """Compile a case and read its code; the binary goes into the folder, under the case's name."""
    config = default_config(case.kernel, case.problem, Target.parse(case.target))
    start = _cpu_seconds()
    compiled = compile_kernel(case.kernel, case.problem, config, case.target)
    seconds = _cpu_seconds() - start
    code = read_machine_code(compiled)
    path = None
    if cubins is not None:
        binary = next(form for form in ("cubin", "hsaco") if form in compiled.asm)
        path = cubins / f"{case.name}.{binary}"
        path.write_bytes(compiled.asm[binary])
    return Reading(
        kernel=case.kernel,
        target=case.target,
        head_dim=case.problem.head_dim,
        dtype=dtype_name(case.problem),
        causal=case.problem.right,
        form=_form(case.problem),
        config=config.as_record(),
        registers=code.registers,
        stack_bytes=code.stack_bytes,
        spill_bytes=code.spill_bytes,
        shared_bytes=code.shared_bytes,
        tensor_memory=code.tensor_memory,
        cubin=None if path is None else str(path),
        compile_seconds=round(seconds, 2),
        blocks_per_sm=_programs(case, code, config.num_warps),
        **_loop_figures(case, code, config),
    )


def _cpu_seconds() -> float:
    """CPU time of this process and of those it waited for, as ptxas."""
    return sum(os.times()[:4])


def _programs(case: Case, code: MachineCode, warps: int) -> int | None:
    rates = RATES.get(Target.parse(case.target).arch)
    return rates and programs_per_sm(rates, code.registers, code.shared_bytes, code.tensor_memory, warps)


def _loop_figures(case: Case, code: MachineCode, config: TileConfig) -> dict:
    """The fields of a Reading that the unmasked loop gives."""
    loop, rates = code.unmasked_loop, RATES.get(Target.parse(case.target).arch)
    figures = dict.fromkeys(("instructions", "non_mma_per_logit", "bounds", "modelled_utilisation"))
    if loop is None:
        return figures
    logits = loop.tiles * config.block_m * config.block_n
    lanes = 32 * config.num_warps / logits
    figures["instructions"] = {name: round(count * lanes, 4) for name, count in sorted(loop.instructions.items())}
    figures["non_mma_per_logit"] = round(loop.other * lanes, 4)
    if rates is not None:
        clocks = cycles(loop, rates, config.num_warps)
        figures["bounds"] = {unit: round(taken / logits, 6) for unit, taken in clocks.items()}
        flops = flops_per_logit(case.kernel, case.problem) * logits
        figures["modelled_utilisation"] = round(utilisation(clocks, flops, rates), 4)
    return figures


def _form(problem: Problem) -> str:
    fields = [field.replace("invariant", "batch_invariant") for field in LETTERS if getattr(problem, field)]
    return " + ".join(fields) or "none"


def dtype_name(problem: Problem) -> str:
    return next(name for name, dtype in DTYPES.items() if dtype == problem.dtype)


def read_all(found: list[Case], workers: int, cubins: Path | None) -> list[Reading]:
    """Readings in the order of the cases, compiled afresh by other processes."""
    if cubins is not None:
        cubins.mkdir(parents=True, exist_ok=True)
    context = multiprocessing.get_context("spawn")
    with (
        tempfile.TemporaryDirectory() as cache,
        ProcessPoolExecutor(workers, context, _start_worker, (cache,)) as pool,
        Progress(total=len(found), unit="kernel", desc="compiling") as progress,
    ):
        tasks = [pool.submit(read, case, cubins) for case in found]
        for task in as_completed(tasks):
            if error := task.exception():
                pool.shutdown(cancel_futures=True)
                raise error
            progress.update()
        return [task.result() for task in tasks]


def _start_worker(cache: str) -> None:
    os.environ["TRITON_CACHE_DIR"] = cache  # empty: every kernel is compiled, and timed


def code_table(readings: list[Reading]) -> str:
    """Table of each kernel's resources, and of the instructions of its unmasked loop per logit."""
    headers = [
        *("kernel", "D", "mask", "form", "tile", "warps", "stages", "regs", "stack", "spill", "shared", "TMEM"),
        *("blocks/SM", "non-MMA", "ceiling", *_mix(readings), "compile s"),
    ]
    rows = []
    for reading in readings:
        config, mix = reading.config, reading.instructions or {}
        rows.append(
            [
                *_identity(reading),
                f"{config['block_m']} x {config['block_n']}",
                config["num_warps"],
                config["num_stages"],
                reading.registers,
                reading.stack_bytes,
                reading.spill_bytes,
                reading.shared_bytes,
                reading.tensor_memory,
                reading.blocks_per_sm,
                _text(reading.non_mma_per_logit),
                _ceiling(reading),
                *(_text(mix.get(name)) for name in _mix(readings)),
                f"{reading.compile_seconds:.1f}",
            ]
        )
    return tabulate(rows, headers, "github", disable_numparse=True)


def model_table(readings: list[Reading]) -> str:
    """Modelled clocks of an SM for 1024 logits of the unmasked loop, by unit."""
    headers = ["kernel", "D", "mask", "form", *UNITS, "utilisation", "bound by"]
    rows = []
    for reading in readings:
        bounds = reading.bounds
        if bounds is None:
            continue
        clocks = [f"{1024 * bounds[unit]:.0f}" for unit in UNITS]
        slowest = max(UNITS, key=lambda unit: bounds[unit])
        rows.append([*_identity(reading), *clocks, f"{reading.modelled_utilisation:.2f}", slowest])
    return tabulate(rows, headers, "github", disable_numparse=True)


def _identity(reading: Reading) -> list:
    return [reading.kernel, reading.head_dim, "causal" if reading.causal else "full", reading.form]


def _mix(readings: list[Reading]) -> list[str]:
    present = {name for reading in readings for name in reading.instructions or ()}
    return [name for name in CLASSES if name in present]


def _ceiling(reading: Reading) -> str:
    """The ceiling of a reading, where there is one: bf16 with query_scale, and maybe a bias of pairs."""
    key, (first, *bias) = (reading.kernel, reading.target, reading.head_dim), reading.form.split(" + ")
    if reading.dtype != "bf16" or first != "query_scale":
        return ""
    return _text(PAIR_BIASES.get((*key, *bias), (None, 0))[0] if bias else NON_MMA_PER_LOGIT.get(key))


def _text(figure: float | None) -> str:
    return "" if figure is None else f"{figure:.2f}"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--targets", type=_targets, default=TARGETS, help="sm_80,gfx942,...: those to compile for")
    parser.add_argument("--head-dims", type=numbers(1, WIDEST), default=(64, 128), help="64,128,...")
    add_chosen(parser, "--kernels", READ, "forward,...: some of them")
    parser.add_argument("--dtype", choices=DTYPES, default="bf16")
    parser.add_argument(
        "--biases", action="store_true", help="causal calls with query_scale, and with each bias, alone"
    )
    parser.add_argument("--json", type=Path, help="write the readings to this file")
    parser.add_argument("--cubins", type=Path, help="write the binaries into this folder, for nvdisasm")
    parser.add_argument("--workers", type=whole_number, default=usable_cores(), help="processes that compile")
    parser.set_defaults(run=run)


def _targets(text: str) -> list[str]:
    names = text.split(",")
    for name in names:
        try:
            Target.parse(name)
        except ValueError as error:
            raise argparse.ArgumentTypeError(str(error)) from error
    return names


def run(arguments: argparse.Namespace) -> None:
    """Compile, print the tables and write the files."""
    check_file("--json", arguments.json)
    found = cases(arguments.targets, arguments.head_dims, DTYPES[arguments.dtype], arguments.kernels)
    if arguments.biases:
        forms = {"query_scale", *(f"query_scale + {bias}" for bias in BIASES)}
        found = [case for case in found if case.problem.right and _form(case.problem) in forms]
    readings = read_all(found, arguments.workers, arguments.cubins)
    facts = {"triton": triton.__version__, "commit": commit()}
    print(HEADING.format(**facts, dtype=arguments.dtype))
    for target in arguments.targets:
        ours = [reading for reading in readings if reading.target == target]
        print(f"\n## {target}\n\n{code_table(ours)}")
        if any(reading.bounds for reading in ours):
            print(f"\nModelled SM clocks for 1024 logits ({RATES[target[3:]].card}'s rates)\n\n{model_table(ours)}")
    print(f"\n{compile_times(readings)}")
    if arguments.json:
        records = [asdict(reading) | facts for reading in readings]
        arguments.json.write_text(json.dumps(records, indent=1) + "\n", encoding="utf-8")


def compile_times(readings: list[Reading]) -> str:
    """The CPU seconds of compilation, which a first call of each of these kernels takes."""
    lines = []
    for kernel in dict.fromkeys(reading.kernel for reading in readings):
        seconds = [reading.compile_seconds for reading in readings if reading.kernel == kernel]
        lines.append([kernel, len(seconds), f"{statistics.median(seconds):.1f}", f"{max(seconds):.1f}"])
    headers = ["compile time (measured, CPU)", "kernels", "median s", "longest s"]
    return tabulate(lines, headers, "github", disable_numparse=True)
