"""The programs of docs/examples run as they stand, and stay short; so do the examples in the docstrings."""

import doctest
import runpy

import pytest

from tests.support.snippets import ROOT

PROGRAMS = sorted((ROOT / "docs/examples").glob("*.py"))
MODULES = [file for file in sorted((ROOT / "tritonattn").rglob("*.py")) if ">>> " in file.read_text(encoding="utf-8")]


@pytest.mark.parametrize("program", PROGRAMS, ids=lambda path: path.stem)
@pytest.mark.filterwarnings("ignore")
def test_program_runs(program, capsys):
    if "transformers" in program.read_text(encoding="utf-8"):
        pytest.importorskip("transformers")
    runpy.run_path(str(program), run_name="__main__")
    assert capsys.readouterr().out.strip()


def test_there_are_seven_of_at_most_sixty_lines_and_a_page_names_them():
    page = (ROOT / "docs/examples.md").read_text(encoding="utf-8")
    assert len(PROGRAMS) == 7
    for program in PROGRAMS:
        assert len(program.read_text(encoding="utf-8").splitlines()) <= 60
        assert f"(examples/{program.name})" in page


@pytest.mark.parametrize("file", MODULES, ids=lambda file: str(file.relative_to(ROOT)))
def test_docstrings(file):
    name = ".".join(file.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
    result = doctest.testmod(pytest.importorskip(name, exc_type=ImportError))
    assert result.attempted == file.read_text(encoding="utf-8").count(">>> ")
    assert result.failed == 0


def test_there_are_docstrings_with_examples():
    assert len(MODULES) >= 20
