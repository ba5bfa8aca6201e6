"""What the command line's commands share."""

from __future__ import annotations

from importlib.util import find_spec


class CommandError(Exception):
    """A message for the person at the command line: shown without a traceback, with exit status 2."""


def require(command: str, modules: list[str], extra: str) -> None:
    """Raise CommandError naming the missing modules and the pip command that brings them."""
    missing = [module for module in modules if find_spec(module) is None]
    if missing:
        raise CommandError(
            f"{command} needs {', '.join(missing)}; to mend it: pip install 'tritonattn[{extra}]'"
        )
