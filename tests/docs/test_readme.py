"""The README's Python runs as it stands, and its table of modes is that of the package."""

from __future__ import annotations

import re

import pytest
import torch

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


@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_its_mode_keeps_padding_out(backend):
    """As the page writes a mode, what no row sees may hold NaN: its author is not asked to think of it."""
    scaling = run("README.md", 1)["LogKeyNorm"]()
    q, k, v = torch.randn(3, 1, 4, 9, 8, dtype=torch.float64).unbind(0)
    lengths = torch.tensor([6])
    hidden = torch.arange(9)[:, None] >= 6
    results = []
    for fill in (0.0, torch.nan):
        leaves = [q.clone().requires_grad_(), *(torch.where(hidden, fill, x).requires_grad_() for x in (k, v))]
        out = tritonattn.attention(*leaves, scaling=scaling, causal=True, key_lengths=lengths, backend=backend)
        results.append([out, *torch.autograd.grad(out.square().sum(), leaves)])
    for clean, dirty in zip(*results, strict=True):
        assert torch.equal(clean, dirty)


def test_every_mode_is_in_the_table():
    rows = re.findall(r"^\| `(\w+)`", README, re.MULTILINE)
    assert rows == list(tritonattn.SCALINGS)


def test_the_two_commands_are_targets_of_the_makefile():
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    for target in re.findall(r"^make (\w+)", README, re.MULTILINE):
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), target
