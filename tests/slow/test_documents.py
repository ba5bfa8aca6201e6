"""The parts of the documents that take long to make: the table of what each backend runs, and every picture."""

import pytest

pytest.importorskip("matplotlib")
pytest.importorskip("scipy")
from docs.figures import studies, watch
from tests.docs.test_generated import check_part


def test_the_table_of_backends_is_not_stale():
    check_part("support")


def test_every_committed_picture_is_drawn_from_the_records_and_small(tmp_path):
    files = {str(file.relative_to(tmp_path)) for file in studies.draw(tmp_path)}
    others = {"layouts.png", "masks.png", "recall-dark.png", "recall-light.png", watch.FIGURE.name}
    assert files | others == {str(file.relative_to(studies.FIGURES)) for file in studies.FIGURES.rglob("*.png")}
    assert all(
        file.stat().st_size < 150_000 for folder in (tmp_path, studies.FIGURES) for file in folder.rglob("*.png")
    )
