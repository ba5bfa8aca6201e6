"""Commands about the kernels and this machine: tune, configs, hub-kernel, env."""

from __future__ import annotations

import platform
from argparse import ArgumentParser, Namespace
from importlib.util import find_spec
from pathlib import Path

import torch

from .. import __version__
from ..core.errors import CommandError
from ..core.provenance import TRITON, version
from ..tuning.config import TILED_KERNELS
from ..tuning.gpus import GPUS
from ..tuning.table import HEAD_DIMS, LENGTHS, RANKED_HEAD_DIMS
from .options import Command, add_chosen, chosen, names, require, whole_number
from .threads import usable_cores

_GPUS = ", ".join(gpu.name for gpu in GPUS)


def _add_tune(parser: ArgumentParser) -> None:
    add = parser.add_argument
    add_chosen(parser, "--kernels", TILED_KERNELS, f"search for some of {','.join(TILED_KERNELS)} (default: all)")
    dims = f"some of {','.join(map(str, HEAD_DIMS))} (default: all; with --static the multiples of 16)"
    add("--head-dims", type=chosen(HEAD_DIMS), metavar="A,B", help=dims)
    dtypes = "time configs in bf16, fp16 or both; an entry serves both (default: bf16)"
    add("--dtypes", type=chosen(("bf16", "fp16")), metavar="A,B", help=dtypes)
    add_chosen(parser, "--lengths", LENGTHS, "short (at most 1024 tokens) or long or both (default: both)")
    add("--calls", metavar="FILE", help="search for the calls that tritonattn.tuning.record wrote there")
    add("--quick", action="store_true", help="compile and time fewer configs, in fewer rounds")
    after = "start nothing new after so many minutes (default: no end)"
    add("--budget", type=float, metavar="MINUTES", help=after)
    static = (
        "without a GPU: write the configs in use whose code passes, else others that do, for some of "
        f"{_GPUS}, for architectures (sm_90, ...) or all"
    )
    add("--static", type=lambda text: names(text) or ("",), metavar="A,B", help=static)
    add("--write", action="store_true", help="write into the package's autotune_cache/ instead of the user's folder")
    workers = "processes that compile (default: one a core)"
    add("--workers", type=whole_number, default=usable_cores(), metavar="N", help=workers)


def _tune(options: Namespace) -> int:
    require("tuning", ["triton", "tqdm"], extra="perf")
    from ..autotune.tune import tune

    if options.static and (options.calls or options.quick):
        raise CommandError("--static: expected neither --calls nor --quick with it: they time calls on a GPU")
    if options.calls and (options.head_dims or options.dtypes):
        raise CommandError("--calls: expected neither --head-dims nor --dtypes with it: the file has them")
    options.head_dims = options.head_dims or (RANKED_HEAD_DIMS if options.static else HEAD_DIMS)
    options.dtypes = options.dtypes or ("bf16",)
    return tune(options)


def _add_configs(parser: ArgumentParser) -> None:
    parser.add_argument("--gpu", metavar="NAME", help=f"the GPU: {_GPUS}, or sm_90, ... (default: this machine's)")


def _configs(options: Namespace) -> int:
    require("configs", ["triton"], extra="perf")
    from ..autotune.in_use import configs

    return configs(options.gpu)


def _add_hub_kernel(parser: ArgumentParser) -> None:
    add = parser.add_argument
    add("folder", type=Path, metavar="FOLDER", help="the folder to write into, new or empty")
    repository = "the repository (default: %(default)s)"
    add("--repo-id", default="tritonattn/tritonattn", metavar="OWNER/NAME", help=repository)
    add("--version", type=int, default=1, metavar="N", help="its version on the hub (default: %(default)s)")


def _hub_kernel(options: Namespace) -> int:
    from ..integrations.hub_kernel import write

    try:
        variants = write(options.folder, options.repo_id, options.version)
    except OSError as error:
        raise CommandError(f"folder: expected a folder, got {str(options.folder)!r}: {error.strerror}") from error
    print(f"{options.folder}: built variants {', '.join(variants)}")
    return 0


def _env(options: Namespace) -> int:
    """Print the versions, then how kernels run; triton may be missing."""
    facts = {
        "tritonattn": __version__,
        "torch": torch.__version__,
        "triton": version(*TRITON),
        "transformers": version("transformers"),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cuda": str(torch.version.cuda),
        "hip": str(torch.version.hip),
    }
    if find_spec("triton") is None:
        facts["kernels run"] = "never: triton is not installed"
    else:
        from ..autotune.in_use import kernel_facts

        facts |= kernel_facts()
    for name, value in facts.items():
        print(f"{name}: {value}")
    return 0


COMMANDS = {
    "tune": Command(
        "search for the fastest tile configs on this GPU, or check them without one",
        "Compile the tile configs of each kernel. Check those whose code fits and spills little against the reference, "
        "and time them. Write the best into the user's table: autotune/GPU.json in $TRITONATTN_CACHE_DIR, else in "
        "$XDG_CACHE_HOME/tritonattn, else in ~/.cache/tritonattn. Stop it at any time: the same command goes on where "
        "it was stopped.",
        _add_tune,
        _tune,
    ),
    "configs": Command(
        "print the tile configs in use, and where each comes from",
        "Print the tile config of every kernel, head dim, set of scales and length, and the table that it comes from.",
        _add_configs,
        _configs,
    ),
    "hub-kernel": Command(
        "write the package as a kernel repository of the HuggingFace hub",
        "Write build.toml, the sources for kernel-builder, and built variants that the library `kernels` loads with "
        "get_local_kernel(FOLDER), into a new or empty folder. Nothing is uploaded.",
        _add_hub_kernel,
        _hub_kernel,
    ),
    "env": Command(
        "print versions, GPU, and the tables in use: for a report",
        "Print versions, GPU, driver, compilers and the tables in use: paste it into a bug report.",
        lambda parser: None,
        _env,
    ),
}
