"""The README's Python runs as it stands, and its table of modes is that of the package."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

import tritonattn

README = (Path(__file__).resolve().parents[1] / "README.md").read_text(encoding="utf-8")
SNIPPETS = re.findall(r"```python\n(.*?)```", README, re.DOTALL)


@pytest.mark.parametrize("position", range(len(SNIPPETS)))
def test_snippets_run(position):
    exec(compile(SNIPPETS[position], f"README.md snippet {position}", "exec"), {"__name__": "__main__"})


def test_no_snippet_is_overlooked():
    assert len(SNIPPETS) == 11
    assert "class LogKeyNorm(Scaling)" in SNIPPETS[1]
    assert "class CountPower(torch.nn.Module, Scaling)" in SNIPPETS[2]
    assert "tritonattn.huggingface.patch(" in SNIPPETS[8]
    assert "replace_multihead_attention" in SNIPPETS[9]


def test_every_mode_is_in_the_table():
    rows = re.findall(r"^\| `(\w+)`", README, re.MULTILINE)
    assert rows == list(tritonattn.SCALINGS)


def test_the_two_commands_are_targets_of_the_makefile():
    makefile = (Path(__file__).resolve().parents[1] / "Makefile").read_text(encoding="utf-8")
    for target in re.findall(r"^make (\w+)", README, re.MULTILINE):
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), target
