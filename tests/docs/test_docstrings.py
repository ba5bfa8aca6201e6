"""The examples in the docstrings."""

import doctest
from pathlib import Path

import pytest

import tritonattn

PACKAGE = Path(tritonattn.__file__).parent
FILES = [file for file in sorted(PACKAGE.rglob("*.py")) if ">>> " in file.read_text(encoding="utf-8")]


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(PACKAGE)))
def test_examples(file):
    name = ".".join(("tritonattn", *file.relative_to(PACKAGE).with_suffix("").parts)).removesuffix(".__init__")
    result = doctest.testmod(pytest.importorskip(name, exc_type=ImportError))
    assert result.attempted == file.read_text(encoding="utf-8").count(">>> ")
    assert result.failed == 0


def test_there_are_examples():
    assert len(FILES) >= 20
