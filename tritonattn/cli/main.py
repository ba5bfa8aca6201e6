"""`tritonattn <command>`, also as `python -m tritonattn`."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from typing import Any

from .. import __version__
from ..core.errors import INTERRUPTED, CommandError, unguard
from . import advise, compare, configs, demo, env, hub_kernel, length_study, simulate, train_compare, tune, watch

# Each module has HELP, DESCRIPTION, add_arguments(parser) and run(options), which imports what only that command needs.
COMMANDS = {
    "demo": demo,
    "compare": compare,
    "advise": advise,
    "simulate": simulate,
    "train-compare": train_compare,
    "length-study": length_study,
    "watch": watch,
    "tune": tune,
    "configs": configs,
    "hub-kernel": hub_kernel,
    "env": env,
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command.

    Returns its exit status: 0; 1 where a check or the system failed, as on a full disk; 2 for wrong usage; 130 when
    interrupted; 141 unread.
    """
    unguard()
    words = sys.argv[1:] if arguments is None else list(arguments)
    try:
        try:
            parser = _parser()
            if not words:
                parser.exit(2, parser.format_help())
            options = parser.parse_args(words)
            return COMMANDS[options.command].run(options)
        finally:
            sys.stdout.flush()
    except CommandError as error:  # also of an option's type, so that the command's name comes from the words
        return _ended(f"tritonattn {words[0]}: {error}", 2)
    except KeyboardInterrupt:
        return _ended("interrupted", INTERRUPTED)
    except BrokenPipeError:  # the reader, as `| head`, has left
        return _ended(None, 141)
    except OSError as error:
        file = "" if error.filename is None else f"{error.filename}: "
        return _ended(f"tritonattn {' '.join(words[:1])}: {file}{error.strerror or error}", 1)


def _ended(message: str | None, status: int) -> int:
    """Print a line on stderr and return the status; drop output that stdout does not take."""
    if message is not None:
        print(message, file=sys.stderr)
    try:
        sys.stdout.flush()
    except OSError:  # the interpreter flushes it once more at exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return status


class _Parser(argparse.ArgumentParser):
    """Raises the error of a help text that stdout does not take, where argparse drops it."""

    def _print_message(self, message: str, file: Any = None) -> None:
        if message and file is sys.stdout:
            file.write(message)
        else:
            super()._print_message(message, file)


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="tritonattn", description="Attention whose logit scaling is a parameter.")
    parser.add_argument("--version", action="version", version=f"tritonattn {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="command", required=True)
    for name, module in COMMANDS.items():
        module.add_arguments(commands.add_parser(name, help=module.HELP, description=module.DESCRIPTION))
    return parser
