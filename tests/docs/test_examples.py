"""The programs of docs/examples run, each as a process of its own, and stay short."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from tests.support.snippets import ROOT

PROGRAMS = sorted((ROOT / "docs/examples").glob("*.py"))


@pytest.mark.parametrize("program", PROGRAMS, ids=lambda path: path.stem)
def test_program_runs(program, tmp_path):
    if "transformers" in program.read_text(encoding="utf-8"):
        pytest.importorskip("transformers")
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    environment.pop("TRITON_INTERPRET", None)
    done = subprocess.run(
        [sys.executable, program], cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip()


def test_there_are_six_of_at_most_sixty_lines_and_a_page_names_them():
    page = (ROOT / "docs/examples.md").read_text(encoding="utf-8")
    assert len(PROGRAMS) == 6
    for program in PROGRAMS:
        assert len(program.read_text(encoding="utf-8").splitlines()) <= 60
        assert f"(examples/{program.name})" in page
