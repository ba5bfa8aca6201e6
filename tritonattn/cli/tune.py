"""`tritonattn tune`."""

from __future__ import annotations

import argparse

from ..core.errors import CommandError
from .configs import GPUS
from .options import chosen, names, require
from .threads import usable_cores

HELP = "search for the fastest tile configs on this GPU, or check them without one"
DESCRIPTION = (
    "Compile the tile configs of each kernel. Check those whose code fits and spills little against the reference, and "
    "time them. Write the best into the user's table: autotune/GPU.json in "
    "$TRITONATTN_CACHE_DIR, else in $XDG_CACHE_HOME/tritonattn, else in ~/.cache/tritonattn. Stop it at any time: the "
    "same command goes on where it was stopped."
)
# Importing them would import triton.
KERNELS, LENGTHS = "forward,grad_key_value,grad_query,decode", "short,long"
HEAD_DIMS = "40,64,72,80,88,96,128,192,256"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--kernels", default=KERNELS, metavar="A,B", help="search for some of %(default)s (default: all)")
    dims = f"some of {HEAD_DIMS} (default: all; with --static the multiples of 16)"
    add("--head-dims", metavar="A,B", help=dims)
    add("--dtypes", metavar="A,B", help="time configs in bf16, fp16 or both; an entry serves both (default: bf16)")
    lengths = "short (at most 1024 tokens) or long or both (default: both)"
    add("--lengths", default=LENGTHS, metavar="A,B", help=lengths)
    add("--calls", metavar="FILE", help="search for the calls that tritonattn.tuning.record wrote there")
    add("--quick", action="store_true", help="compile and time fewer configs, in fewer rounds")
    after = "start nothing new after so many minutes (default: no end)"
    add("--budget", type=float, metavar="MINUTES", help=after)
    static = (
        "without a GPU: write the configs in use whose code passes, else others that do, for some of "
        f"{GPUS}, for architectures (sm_90, ...) or all"
    )
    add("--static", type=lambda text: names(text) or ("",), metavar="A,B", help=static)
    add("--write", action="store_true", help="write into the package's autotune_cache/ instead of the user's folder")
    add("--workers", type=int, default=usable_cores(), metavar="N", help="processes that compile (default: one a core)")


def run(options: argparse.Namespace) -> int:
    require("tuning", ["triton", "tqdm"], extra="perf")
    from ..tuner.tune import DTYPES, tune
    from ..tuning.config import TILED_KERNELS
    from ..tuning.table import HEAD_DIMS, LENGTHS, RANKED_HEAD_DIMS

    _refuse_what_calls_say(options)
    # These modules import triton, which may be missing: so the values are checked here.
    options.kernels = chosen("--kernels", TILED_KERNELS)(options.kernels)
    dims = RANKED_HEAD_DIMS if options.static else HEAD_DIMS
    options.head_dims = dims if options.head_dims is None else chosen("--head-dims", HEAD_DIMS)(options.head_dims)
    options.lengths = chosen("--lengths", LENGTHS)(options.lengths)
    options.dtypes = chosen("--dtypes", tuple(DTYPES))(options.dtypes or "bf16")
    return tune(options)


def _refuse_what_calls_say(options: argparse.Namespace) -> None:
    if options.static and (options.calls or options.quick):
        raise CommandError("--static: expected neither --calls nor --quick with it: they time calls on a GPU")
    if options.calls and (options.head_dims or options.dtypes):
        raise CommandError("--calls: expected neither --head-dims nor --dtypes with it: the file has them")
