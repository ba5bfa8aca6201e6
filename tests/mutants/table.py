"""The table of faults: the function, the code as it stands, the code with the fault, the test that must catch it."""

from pathlib import Path
from typing import NamedTuple

from .place import Place, places

ROOT = Path(__file__).resolve().parents[2]
TABLE = Path(__file__).with_name("table.txt")


class Mutant(NamedTuple):
    """A fault of one expression or statement.

    file      in the package, or one that begins with perf/
    function  `name` or `Class.name` in the file; "" for the whole file
    code      as it stands, once in the function, whatever its layout
    fault     what replaces it
    test      a pytest id; where it has parameters and the id names none, one of them must fail
    """

    file: str
    function: str
    name: str
    code: str
    fault: str
    test: str

    @property
    def where(self) -> str:
        """The file and the function, as the table names them."""
        return f"{self.file}::{self.function}" if self.function else self.file

    @property
    def is_interpreted(self) -> bool:
        """True where its test runs kernels in Triton's interpreter."""
        return self.test.startswith("tests/kernels/")

    def place(self, root: Path = ROOT) -> Place:
        """Where the code stands in a checkout: in the file or, if not there, in a function of this name elsewhere.

        Raises ValueError unless it stands there once.
        """
        here = root / (self.file if self.file.startswith("perf/") else f"tritonattn/{self.file}")
        found = places(here, self.function, self.code)
        if not found:
            others = sorted(path for folder in ("tritonattn", "perf") for path in (root / folder).rglob("*.py"))
            found = [place for path in others for place in places(path, self.function, self.code)]
        if len(found) != 1:
            raise ValueError(f"{self.name}: expected {self.code!r} once in {self.where}, got it {len(found)} times")
        return found[0]


def read_table(text: str | None = None) -> list[Mutant]:
    """The faults of table.txt, or of a text like it: four lines each, between comments and blank lines."""
    lines = (TABLE.read_text(encoding="utf-8") if text is None else text).splitlines()
    lines = [line for line in lines if line and not line.startswith("#")]
    return [_mutant(lines[at : at + 4]) for at in range(0, len(lines), 4)]


def _mutant(block: list[str]) -> Mutant:
    """From "file::function: name", the code behind "- ", the fault behind "+ ", and a test."""
    if len(block) != 4 or ": " not in block[0] or block[1][:2] != "- " or block[2][:2] != "+ ":
        raise ValueError(f"table.txt: expected file::function: name, - code, + fault and a test, got {block}")
    where, name = block[0].split(": ", 1)
    file, _, function = where.partition("::")
    return Mutant(file, function, name, block[1][2:], block[2][2:], block[3])
