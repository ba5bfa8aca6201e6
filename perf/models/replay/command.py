"""`python -m perf replay`: a table of replayed kernels, or the loops of a binary from elsewhere."""

from __future__ import annotations

import argparse
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace as with_fields
from itertools import product
from multiprocessing import get_context
from pathlib import Path
from typing import NamedTuple

import torch
import triton
from tabulate import tabulate

from tritonattn.cli.options import add_chosen, whole_number, whole_numbers
from tritonattn.cli.threads import usable_cores
from tritonattn.core.progress import Progress
from tritonattn.core.provenance import commit
from tritonattn.tuning import Problem, Target, compile_kernel
from tritonattn.tuning.config import TILED_KERNELS, TileConfig, legal_reasons
from tritonattn.tuning.defaults import gluon_config
from tritonattn.tuning.lookup import config_for

from ..static.machine_code import disassemble
from ..static.model import RATES
from .control import parse_with_controls
from .kernel import EVERY_POLL, ITERATIONS, WARM, Replay, replay
from .loops import loop_body, tensor_spans
from .operations import operations
from .parameters import PARAMETERS
from .scheduler import Scheduler, Timeline, Warps
from .times import clocks_of_triton_tutorial, error_of_flash_attention_3

# Decoding waits for memory, which the replay does not model.
KERNELS = tuple(kernel for kernel in TILED_KERNELS if kernel != "decode")

HEADING = """# Loops of the kernels, replayed

Modelled: the unmasked loop of each kernel in bf16 with a query_scale, compiled by triton {triton} at commit {commit},
replayed by its control codes; nothing ran. `{command}`.

- The config is that of the shipped table, and the same with other stages of the pipeline. "in Gluon": the forward that
  no table has, its loads taken to be there in time.
- tensor rate: share of the processor's tensor rate while the loop runs. clocks: of an iteration of a program, while as
  many programs run as a processor holds. Waits: share of a warp's time, by reason.
- "asks late": an iteration waits for what the one before it, or it itself, asked for. "serialised": more waits for
  products than the source has.
- Error: with loops of FlashAttention-3 replayed so and taken for 1.085 times as long, its published times on an H100
  are met with a mean error of {late} from 2,048 keys on, {all} over all 20. The published rates of Triton's tutorial
  are those of the model at {low:.2f} to {high:.2f} GHz; its clock was not published. No time of another card was
  compared, nor of these kernels: shares of sm_90 may be off by 15%, and those of other targets rank configs.
- Not in the model: memory behind L2 (so decoding is left out), the instruction cache, bank conflicts, power. sm_100
  and sm_120 are not replayed but bounded, by the rates of their units and by what loads leave exposed. Where one
  program fits a processor of sm_100, its products and softmax take turns: the least; the remark has the most."""


class Case(NamedTuple):
    kernel: str
    head_dim: int
    target: Target
    config: TileConfig

    @property
    def problem(self) -> Problem:
        return _problem(self.head_dim)


def _problem(head_dim: int) -> Problem:
    return Problem(head_dim, head_dim, torch.bfloat16, query_scale=True)


def cases(
    targets: list[str], head_dims: tuple[int, ...], stages: tuple[int, ...], kernels: tuple[str, ...] = KERNELS
) -> list[Case]:
    """List every kernel's shipped config, the same with other stages where that is legal, and Gluon's forward."""
    found = []
    for name, head_dim, kernel in product(targets, head_dims, kernels):
        target, problem = Target.parse(name), _problem(head_dim)
        shipped = config_for(kernel, problem, target)
        configs = dict.fromkeys([shipped, *(with_fields(shipped, num_stages=count) for count in stages)])
        if kernel == "forward" and (in_gluon := gluon_config(problem, target)):
            configs[in_gluon] = None
        legal = [config for config in configs if not legal_reasons(kernel, config, problem, target)]
        found += [Case(kernel, head_dim, target, config) for config in legal]
    return found


def examine(case: Case) -> Replay:
    """Compile a case and replay it."""
    return replay(compile_kernel(case.kernel, case.problem, case.config, case.target), case.config, case.target)


def replay_table(results: list[tuple[Case, Replay]]) -> str:
    """Lay out a line for each case, those of a kernel below one another."""
    headers = [
        *("kernel", "D", "tile", "warps", "stages", "loads by", "registers", "programs"),
        *("tensor rate", "clocks", "waits for", "remarks"),
    ]
    rows = []
    for case, found in results:
        config = case.config
        rows.append(
            [
                case.kernel,
                case.head_dim,
                f"{config.block_m} x {config.block_n}",
                config.num_warps,
                config.num_stages,
                "TMA" if config.descriptors else "cp.async",
                found.registers,
                found.programs,
                f"{found.share:.3f}",
                f"{found.clocks:.0f}",
                waits_text(found.waits),
                ", ".join(_remarks(config, found)),
            ]
        )
    return tabulate(rows, headers, "github", disable_numparse=True)


def waits_text(waits: dict[str, float]) -> str:
    """Name the reasons that take at least 5% of a warp's time, the longest first."""
    return ", ".join(f"{name} {share:.0%}" for name, share in waits.items() if share >= 0.05)


def _remarks(config: TileConfig, found: Replay) -> list[str]:
    remarks = ["in Gluon"] if config.kernel == "gluon" else []
    remarks += ["does not fit"] if found.programs == 0 else []
    remarks += ["asks late"] if found.awaits_last else []
    overlaps = found.overlapped is not None and found.overlapped > found.share
    remarks += [f"{found.overlapped:.3f} if products and softmax overlap"] if overlaps else []
    return remarks + (["serialised"] if found.is_serialised else [])


def loops_of_binary(path: Path, function: str, warps: int) -> list[tuple[int, Timeline]]:
    """Replay the tensor loops of a function in a cubin from elsewhere, all of its loads taken to be there in time.

    function: a part of its name. warps: of its program, those that run the loop. Return each loop's number of
    instructions, and its timeline while a processor holds one program.
    """
    parameters = PARAMETERS["90"]
    listing = disassemble(path.read_bytes())
    sections = [text for text in listing.split("\n\t.section\t.text.")[1:] if function in text.partition(",")[0]]
    if len(sections) != 1:
        raise ValueError(f"function: expected part of one name in {path}, got {function!r}, of {len(sections)}")
    code, controls = parse_with_controls(sections[0])
    found = []
    for span in tensor_spans(code):
        inside = operations(*loop_body(code, controls, span), parameters)
        timeline = Scheduler(inside, Warps(1, max(1, warps // 4), ahead=EVERY_POLL), parameters).run(ITERATIONS, WARM)
        found.append((len(span.body), timeline))
    return found


def add_arguments(parser: argparse.ArgumentParser) -> None:
    targets = [f"sm_{arch}" for arch in PARAMETERS]
    parser.add_argument("--targets", type=_targets, default=targets, help="sm_90,...: those to compile for")
    parser.add_argument("--head-dims", type=whole_numbers, default=(64, 128), help="64,128,...")
    add_chosen(parser, "--kernels", KERNELS, "forward,...: some of them")
    parser.add_argument("--stages", type=whole_numbers, default=(2, 3), help="also the configs with these: 2,3,...")
    parser.add_argument("--workers", type=whole_number, default=usable_cores(), help="processes that compile")
    parser.add_argument("--cubin", type=Path, help="replay the loops of this sm_90 binary instead")
    parser.add_argument("--function", default="", help="part of the name of the binary's function")
    parser.add_argument("--warps", type=whole_number, default=8, help="warps of a program that run the binary's loop")
    parser.set_defaults(run=run)


def _targets(text: str) -> list[str]:
    for name in text.split(","):
        if name.removeprefix("sm_") not in RATES:
            raise argparse.ArgumentTypeError(f"expected some of sm_{', sm_'.join(RATES)}, got {name!r}")
    return text.split(",")


def run(arguments: argparse.Namespace) -> None:
    """Compile, replay and print."""
    if arguments.cubin:
        found = loops_of_binary(arguments.cubin, arguments.function, arguments.warps)
        rows = [[count, f"{timeline.clocks:.1f}", waits_text(timeline.waits)] for count, timeline in found]
        headers = ["instructions", "clocks", "waits for"]
        print(tabulate(rows, headers, "github", disable_numparse=True, stralign="right"))
        return
    wanted = cases(arguments.targets, arguments.head_dims, arguments.stages, arguments.kernels)
    with ProcessPoolExecutor(arguments.workers, get_context("spawn")) as pool:
        tasks = [pool.submit(examine, case) for case in wanted]
        results = [(case, task.result()) for case, task in zip(wanted, Progress(tasks, unit="kernel"), strict=True)]
    names, dims, stages = (",".join(map(str, x)) for x in (arguments.targets, arguments.head_dims, arguments.stages))
    of_kernels = "" if arguments.kernels == KERNELS else f" --kernels {','.join(arguments.kernels)}"
    clocks = clocks_of_triton_tutorial()
    print(
        HEADING.format(
            triton=triton.__version__,
            commit=commit(),
            command=f"python -m perf replay --targets {names} --head-dims {dims}{of_kernels} --stages {stages}",
            late=f"{error_of_flash_attention_3(2048):.1%}",
            all=f"{error_of_flash_attention_3():.1%}",
            low=min(clocks) / 1000,
            high=max(clocks) / 1000,
        )
    )
    for name in arguments.targets:
        print(f"\n## {name}\n\n{replay_table([one for one in results if one[0].target.name == name])}")
