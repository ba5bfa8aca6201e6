"""`tritonattn tune`."""

from __future__ import annotations

import argparse

from .options import chosen, names, require, usable_cores

HELP = "search for the fastest tile configs on this GPU, or rank them without one"
DESCRIPTION = (
    "Compile the configs of each kernel, time the most promising ones that pass the static checks, each checked "
    "against the reference, and write the best into the user's table. Stop it at any time: the same command goes on "
    "where it was stopped."
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--kernels", default="forward,grad_key_value,grad_query,decode", metavar="A,B")
    add("--head-dims", default="64,80,96,128,192,256", metavar="A,B")
    add("--dtypes", default="bf16", metavar="A,B", help="bf16,fp16: what configs are timed in; an entry serves both")
    add("--lengths", default="short,long", metavar="A,B", help="at most 1024 tokens, and more")
    after = "begin no search, nor an architecture's tables, after so long"
    add("--budget", type=float, metavar="MINUTES", help=after)
    add(
        "--static",
        type=lambda text: names(text) or ("",),
        metavar="A,B",
        help="h100, sm_90, ..., all: rank by a model instead; needs no GPU",
    )
    add("--write", action="store_true", help="write into autotune_cache/, not the user's folder")
    add("--workers", type=int, default=usable_cores(), metavar="N", help="processes that compile (default: one a core)")


def run(options: argparse.Namespace) -> int:
    require("tuning", ["triton", "tabulate", "tqdm"], extra="perf")
    from ..tuner.tune import DTYPES, tune
    from ..tuning.config import TILED_KERNELS
    from ..tuning.table import HEAD_DIMS, LENGTHS

    # These modules import triton, which may be missing: so the values are checked here.
    options.kernels = chosen("--kernels", TILED_KERNELS)(options.kernels)
    options.head_dims = chosen("--head-dims", HEAD_DIMS)(options.head_dims)
    options.lengths = chosen("--lengths", LENGTHS)(options.lengths)
    options.dtypes = chosen("--dtypes", tuple(DTYPES))(options.dtypes)
    return tune(options)
