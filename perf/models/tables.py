"""Make the shipped tables of tile configs without a GPU: rank them by the replay of their loops.

`tritonattn tune --static` ranks nothing: it writes the config in use where its code passes.
"""

from __future__ import annotations

import argparse
import functools
import math

from triton.compiler import CompiledKernel

from tritonattn.autotune.tune import tune_static
from tritonattn.cli.options import names, whole_number, whole_numbers
from tritonattn.cli.threads import usable_cores
from tritonattn.tuning.config import TILED_KERNELS, Target, TileConfig
from tritonattn.tuning.table import RANKED_HEAD_DIMS, keys

from .replay import replay
from .replay.parameters import PARAMETERS
from .static.gate import Latency, examine
from .static.ranking import ranked_table


def latency(compiled: CompiledKernel, config: TileConfig, target: Target) -> Latency:
    """Replay a kernel's loop; where the target is not replayed, say only whether its loads are asked for in time."""
    found = replay(compiled, config, target)
    clocks = found.clocks if target.arch in PARAMETERS else None
    return Latency(found.share, clocks, found.programs, found.awaits_last)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("static", metavar="gpus", type=names, help="h100,..., architectures (sm_90,...) or all")
    parser.add_argument("--kernels", type=names, default=TILED_KERNELS, help="some of them: forward,...")
    parser.add_argument("--head-dims", type=whole_numbers, default=RANKED_HEAD_DIMS, help="some of them: 64,...")
    parser.add_argument("--workers", type=whole_number, default=usable_cores(), help="processes that compile")
    parser.add_argument("--write", action="store_true", help="into autotune_cache/, not the user's folder")
    parser.set_defaults(run=run, budget=None)


def run(options: argparse.Namespace) -> None:
    """Compile, rank, print what changed, and write."""
    wanted = list(keys(options.kernels, options.head_dims))
    tune_static(options, wanted, math.inf, ranked_table, functools.partial(examine, model=latency))
