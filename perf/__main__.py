"""`python -m perf <command>`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from importlib import import_module
from types import ModuleType

from tritonattn.core.errors import INTERRUPTED, CommandError

# The commands of each room; a command's module has its name.
ROOMS = {
    "sweep": {
        "sweep": "times and errors next to those of other implementations, as JSON lines",
        "report": "tables of a sweep's records",
        "plot": "charts of a sweep's records",
    },
    "gpu": {
        "gpu": "all that a GPU machine is asked for, in one command",
        "preflight": "whether kernels run on this machine and are right, within a minute",
        "compile": "the kernels of soak and sweeps, by all cores, before anything is timed",
        "derivatives": "tangents and their gradients: values, and times next to PyTorch's math path",
        "stages": "two stages of a kernel's pipeline against three on a GPU, and the replay's gain",
        "flash": "the kernels against FlashAttention or cuDNN with folded factors, on a GPU that has them",
        "correctness": "the kernels' tests, in several processes",
    },
    "soak": {
        "invariance": "random sequences alone and with the rest of a batch: whether batch_invariant keeps their bits",
        "soak": "random calls of the kernels, for a while, against float64",
        "sanitize": "a short soak under NVIDIA's compute-sanitizer",
    },
    "cpu": {
        "cpu": "time and memory on a CPU, against PyTorch's attention",
        "memory": "bytes that a call keeps for its backward, by form",
        "monitor": "what watching a training run costs",
        "compilations": "distinct kernels that ordinary training, decoding and packing compile",
        "distributed": "bytes, time and memory of a sequence that ranks share: measured, and a model of more ranks",
        "launches": "the host's time and work in small calls, on a stub of NVIDIA's driver",
        "serving": "the host's time a step in vLLM's attention layers, on the same stub",
    },
    "models": {
        "codegen": "the machine code of every kernel: registers, spills, instructions per logit",
        "replay": "a model of every kernel's loop: share of the tensor rate, and what its warps wait for",
        "tables": "the shipped tables of tile configs, ranked by the replay",
        "ptxas": "every kernel's PTX by the ptxas of several CUDA releases, side by side",
        "fill": "how full a card is under calls of few programs, unsplit and in splits: a model",
        "schedule": "when the tiles of a causal forward end, by the order of programs: a model",
    },
    "studies": {
        "train-compare": "small models trained with each scaling, several seeds each, on small tasks",
        "length-study": "the loss by position of a pretrained model, beyond its trained context, with each scaling",
        "language-model": "small GPTs beyond their trained length, by factor and kinds of layer: hours",
    },
}
ROOM_OF = {command: room for room, commands in ROOMS.items() for command in commands}


def main(arguments: Sequence[str] | None = None) -> None:
    """Run one command; the exit status is 130 when interrupted, else the command's."""
    lines = [f"  {name:16}{text}" for commands in ROOMS.values() for name, text in commands.items()]
    parser = argparse.ArgumentParser(
        prog="python -m perf",
        description="Measure, read and try the package.",
        epilog="\n".join(["commands:", *lines]),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("command", choices=ROOM_OF, metavar="command", help="see below; `<command> --help` says more")
    parser.add_argument("arguments", nargs=argparse.REMAINDER, help=argparse.SUPPRESS)
    chosen = parser.parse_args(arguments)
    try:
        _run(chosen.command, chosen.arguments)
    except CommandError as error:
        sys.exit(f"{chosen.command}: {error}")
    except KeyboardInterrupt:
        print(f"{chosen.command}: interrupted", file=sys.stderr)
        sys.exit(INTERRUPTED)


def module_of(command: str) -> ModuleType:
    """Import the module of one command alone, since a machine may lack the packages of the others."""
    return import_module(f".{ROOM_OF[command]}.{command.replace('-', '_')}", __package__)


def _run(command: str, arguments: Sequence[str]) -> None:
    module = module_of(command)
    parser = argparse.ArgumentParser(prog=f"python -m perf {command}", description=module.__doc__)
    module.add_arguments(parser)
    options = parser.parse_args(arguments)
    options.run(options)


if __name__ == "__main__":
    main()
