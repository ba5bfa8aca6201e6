"""The table of faults: in which file, the line as it stands, the line with the fault, the test that must catch it."""

from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[2]
TABLE = Path(__file__).with_name("table.txt")


class Mutant(NamedTuple):
    """A fault of one line.

    file    in the package, or one that begins with perf/
    line    as it stands, once in the file
    fault   what replaces it
    test    a pytest id; where it has parameters and the id names none, one of them must fail
    """

    file: str
    name: str
    line: str
    fault: str
    test: str

    @property
    def path(self) -> str:
        """The file from the checkout's root."""
        return self.file if self.file.startswith("perf/") else f"tritonattn/{self.file}"

    @property
    def is_interpreted(self) -> bool:
        """True where its test runs kernels in Triton's interpreter."""
        return self.test.startswith("tests/kernels/")

    def applied(self, source: str) -> str:
        """The file's text with the fault. Raises ValueError unless the line stands there once."""
        count = source.count(self.line)
        if count != 1:
            raise ValueError(f"{self.name}: expected {self.line!r} once in {self.path}, got it {count} times")
        return source.replace(self.line, self.fault)


def read_table(text: str | None = None) -> list[Mutant]:
    """The faults of table.txt, or of a text like it: four lines each, between comments and blank lines."""
    lines = (TABLE.read_text(encoding="utf-8") if text is None else text).splitlines()
    lines = [line for line in lines if line and not line.startswith("#")]
    return [_mutant(lines[at : at + 4]) for at in range(0, len(lines), 4)]


def _mutant(block: list[str]) -> Mutant:
    """From "file: name", the line behind "- ", the fault behind "+ ", and a test."""
    if len(block) != 4 or ": " not in block[0] or block[1][:2] != "- " or block[2][:2] != "+ ":
        raise ValueError(f"table.txt: expected file: name, - line, + fault and a test, got {block}")
    file, name = block[0].split(": ", 1)
    return Mutant(file, name, block[1][2:], block[2][2:], block[3])
