"""The README's Python runs as it stands, and its table of modes is that of the package."""

from __future__ import annotations

import re

import pytest

import tritonattn
from tests.support.snippets import ROOT, run, snippets

README = (ROOT / "README.md").read_text(encoding="utf-8")
SNIPPETS = snippets("README.md")


@pytest.mark.parametrize("position", range(len(SNIPPETS)))
def test_snippets_run(position):
    run("README.md", position)


def test_no_snippet_is_overlooked():
    assert len(SNIPPETS) == 12
    assert "class LogKeyNorm(Scaling)" in SNIPPETS[1]
    assert "class CountPower(torch.nn.Module, Scaling)" in SNIPPETS[2]
    assert "tritonattn.huggingface.patch(" in SNIPPETS[9]
    assert "replace_multihead_attention" in SNIPPETS[10]


def test_every_mode_is_in_the_table():
    rows = re.findall(r"^\| `(\w+)`", README, re.MULTILINE)
    assert rows == list(tritonattn.SCALINGS)


def test_the_two_commands_are_targets_of_the_makefile():
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    for target in re.findall(r"^make (\w+)", README, re.MULTILINE):
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), target
