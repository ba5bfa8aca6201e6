"""The parts of the documents that take long to make: tables of interpreted kernels, pictures, controls of examples."""

import runpy
import sys

import pytest

pytest.importorskip("matplotlib")
pytest.importorskip("scipy")
from docs.figures import studies, watch
from tests.docs.test_documents import INTERPRETED, ROOT, SLOW, check_part


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


@pytest.mark.filterwarnings("ignore")
def test_the_program_that_trains_runs(capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", [str(SLOW)])
    runpy.run_path(str(SLOW), run_name="__main__")
    assert capsys.readouterr().out.strip()


@pytest.mark.filterwarnings("ignore")
def test_the_claim_of_a_program_fails_without_its_cause():
    file = ROOT / "docs/examples/monitor_clip.py"
    source, line = file.read_text(encoding="utf-8"), "clip(alarms).items()"
    assert source.count(line) == 1
    with pytest.raises(AssertionError) as failure:
        exec(compile(source.replace(line, "{}.items()"), str(file), "exec"), {"__name__": "__main__"})
    assert failure.traceback[-1].lineno == len(source.splitlines()) - 1  # the last line's
