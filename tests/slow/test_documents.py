"""The parts of the documents that take long to make: the tables of interpreted kernels, and every picture."""

from functools import partial

import pytest

pytest.importorskip("matplotlib")
pytest.importorskip("scipy")
from docs.figures import studies, watch
from tests.docs.test_documents import INTERPRETED, check_part
from tritonattn.lab.figures import save
from tritonattn.lab.length import report as length
from tritonattn.lab.simulation import plot as simulation
from tritonattn.lab.training import plot as training


def test_tables_of_interpreted_kernels_are_not_stale():
    for name in INTERPRETED:
        check_part(name)


def test_every_committed_picture_is_drawn_from_the_records_and_small(tmp_path, monkeypatch):
    for module in (length, simulation, training):
        monkeypatch.setattr(module, "save", partial(save, dpi=20))
    drawn = {str(file.relative_to(tmp_path)) for file in studies.draw(tmp_path)}
    others = {"layouts.png", "masks.png", "recall-dark.png", "recall-light.png", watch.FIGURE.name}
    committed = {str(file.relative_to(studies.FIGURES)): file for file in studies.FIGURES.rglob("*.png")}
    assert drawn | others == committed.keys()
    assert all(file.stat().st_size < 150_000 for file in committed.values())
