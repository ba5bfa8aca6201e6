"""`tritonattn <command>`, also as `python -m tritonattn`."""

from __future__ import annotations

import argparse
import difflib
import os
import sys
from collections.abc import Sequence
from typing import Any, NoReturn

from .. import __version__
from ..core.errors import INTERRUPTED, CommandError
from . import machine, models, studies

COMMANDS = studies.COMMANDS | models.COMMANDS | machine.COMMANDS


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command.

    Returns its exit status: 0; 1 where a check or the system failed, as on a full disk; 2 for wrong usage; 130 when
    interrupted; 141 unread.
    """
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
    except CommandError as error:
        return _ended(f"{_name(words)}: {error}", 2)
    except KeyboardInterrupt:
        return _ended("interrupted", INTERRUPTED)
    except BrokenPipeError:  # the reader, as `| head`, has left
        return _ended(None, 141)
    except OSError as error:
        file = "" if error.filename is None else f"{error.filename}: "
        return _ended(f"{_name(words)}: {file}{error.strerror or error}", 1)


def _name(words: Sequence[str]) -> str:
    """The name of the command that was called, for its errors."""
    return " ".join(["tritonattn", *(word for word in words[:1] if word in COMMANDS)])


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
    """A parser whose errors are one line."""

    def error(self, message: str) -> NoReturn:
        raise CommandError(message)

    def _check_value(self, action: argparse.Action, value: Any) -> None:
        """Name the nearest choice to a wrong one, such as the command that was meant."""
        try:
            super()._check_value(action, value)
        except argparse.ArgumentError as error:
            near = difflib.get_close_matches(str(value), map(str, action.choices or ()), n=1)
            hint = "".join(f"; did you mean {one}?" for one in near)
            raise argparse.ArgumentError(action, error.message + hint) from None


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="tritonattn", description="Attention whose logit scaling is a parameter.")
    parser.add_argument("--version", action="version", version=f"tritonattn {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="command", required=True)
    for name, command in COMMANDS.items():
        command.add_arguments(commands.add_parser(name, help=command.help, description=command.description))
    return parser
