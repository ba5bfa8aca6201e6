"""Command lines that are refused before any work."""

from collections.abc import Iterable

import pytest

from tritonattn.cli import main as cli


def assert_refused(capsys: pytest.CaptureFixture[str], command: str, parts: Iterable[str]) -> None:
    """`tritonattn COMMAND` exits with 2, prints nothing, and says all parts on stderr."""
    assert cli.main(command.split()) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    for part in (f"tritonattn {command.split()[0]}: ", *parts):
        assert part in captured.err
