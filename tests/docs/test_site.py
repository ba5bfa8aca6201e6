"""`make docs` builds the site: every page, with no warning and no dead link."""

import os
import re
import subprocess
import sys
from importlib.metadata import metadata

import pytest

import tritonattn.distributed
from tests.support.snippets import ROOT

pytest.importorskip("mkdocs", reason="pip install 'tritonattn[docs]'")
pytest.importorskip("material", reason="pip install 'tritonattn[docs]'")


@pytest.mark.slow
def test_it_builds_without_a_warning(tmp_path):
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path)]
    environment = {**os.environ, "NO_MKDOCS_2_WARNING": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    for page in (ROOT / "docs").glob("*.md"):
        assert (tmp_path / f"{page.stem}.html").is_file()
    for page in tmp_path.glob("*.html"):
        shown = page.read_text(encoding="utf-8")
        for picture in re.findall(r'src="([^"]+)\.png#only-light"', shown):
            assert f'src="{picture}-dark.png#only-dark"' in shown
            assert (tmp_path / f"{picture}-dark.png").is_file()
    shown = (tmp_path / "concepts.html").read_text(encoding="utf-8")
    assert f"tritonattn {metadata('tritonattn')['Version']}" in shown
    assert all(f'rel="{way}"' in shown for way in ("prev", "next"))
    assert "masks.png#only-light" in shown
    api = "".join(page.read_text(encoding="utf-8") for page in tmp_path.glob("api*.html"))
    public = {"tritonattn.analysis.Monitor"} | {
        f"{module.__name__}.{name}"
        for module in (tritonattn, tritonattn.nn, tritonattn.distributed)
        for name in {*module.__all__} - {"SCALINGS", "LEARNED", "Learned", "__version__", "nn"}
    }
    assert {name for name in public if f'id="{name}"' not in api} == set()
    assert "<blockquote>" not in api, "a docstring's doctest is set as prose"
