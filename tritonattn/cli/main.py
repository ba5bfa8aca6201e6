"""`tritonattn <command>`, also as `python -m tritonattn`."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence

from .. import __version__
from ..core.errors import INTERRUPTED, CommandError
from . import advise, compare, configs, demo, env, hub_kernel, length_study, simulate, train_compare, tune

# Each module has HELP, DESCRIPTION, add_arguments(parser) and run(options), which imports what only that command needs.
COMMANDS = {
    "demo": demo,
    "compare": compare,
    "advise": advise,
    "simulate": simulate,
    "train-compare": train_compare,
    "length-study": length_study,
    "tune": tune,
    "configs": configs,
    "hub-kernel": hub_kernel,
    "env": env,
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; exit status 0, 1 where a check failed, 2 for wrong usage, 130 when interrupted, 141 unread."""
    words = sys.argv[1:] if arguments is None else list(arguments)
    try:
        options = _parser().parse_args(words)
        status = COMMANDS[options.command].run(options)
        print(end="", flush=True)
        return status
    except CommandError as error:  # also of an option's type, so that the command's name comes from the words
        print(f"tritonattn {words[0]}: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:  # the reader, as `| head`, has left; the interpreter flushes stdout once more at exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="tritonattn", description="Attention whose logit scaling is a parameter.")
    parser.add_argument("--version", action="version", version=f"tritonattn {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="command", required=True)
    for name, module in COMMANDS.items():
        module.add_arguments(commands.add_parser(name, help=module.HELP, description=module.DESCRIPTION))
    return parser
