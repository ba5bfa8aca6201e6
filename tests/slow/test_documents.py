"""The parts of the documents that take long to make: the tables of interpreted kernels, and every picture."""

import pytest

pytest.importorskip("matplotlib")
pytest.importorskip("scipy")
from docs.figures import studies, watch
from tests.docs.test_documents import INTERPRETED, check_part


def test_tables_of_interpreted_kernels_are_not_stale():
    for name in INTERPRETED:
        check_part(name)


def test_every_committed_picture_is_drawn_from_the_records_and_small():
    drawn = {name.removesuffix(".png") for name, _ in studies.figures()} | {
        "kernels",
        "language-model",
        "layouts",
        "masks",
        "recall",
        watch.FIGURE.stem,
    }
    both = {f"{name}{look}.png" for name in drawn for look in ("", "-dark")}
    committed = {str(file.relative_to(studies.FIGURES)): file for file in studies.FIGURES.rglob("*.png")}
    assert both == committed.keys()
    assert all(file.stat().st_size < 150_000 for file in committed.values())
