"""`train-compare --report`, and that docs/training.md says what the records say."""

import shutil
from pathlib import Path

import pytest

from tritonattn.cli import main as cli
from tritonattn.lab.training import plot

DOCS = Path(__file__).parents[3] / "docs"


@pytest.fixture
def recorded(tmp_path, monkeypatch):
    """A folder with the documented runs; plots are not drawn."""
    monkeypatch.setattr(plot, "draw", lambda runs, file: file.touch())
    return shutil.copytree(DOCS / "data" / "training", tmp_path / "lab")


@pytest.mark.parametrize("options", [[], ["--grid"]], ids=["modes", "grid"])
def test_the_document_has_the_tables_of_the_records(recorded, options, capsys):
    assert cli.main(["train-compare", "--report", "--out", str(recorded), *options]) == 0
    rows = [line for line in capsys.readouterr().out.splitlines() if line.startswith("|")]
    assert len(rows) > 10
    document = (DOCS / "training.md").read_text(encoding="utf-8")
    assert [row for row in rows if row not in document] == []
