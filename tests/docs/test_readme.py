"""The README fits a screen, its Python runs, its tables are the package's; the mode in the documents is a good one."""

import re

import pytest
import torch

import tritonattn
from tests.support.snippets import ROOT, run, snippets

README = (ROOT / "README.md").read_text(encoding="utf-8")
SCALINGS_PAGE = "docs/scalings.md"


def test_it_is_short_its_code_runs_and_its_commands_are_targets():
    assert len(README.splitlines()) <= 130
    (code,) = snippets("README.md")
    assert len([line for line in code.splitlines() if line]) <= 6
    assert all(run("README.md", 0)[name].grad is not None for name in "qkv")
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    for target in re.findall(r"^make (\w+)", README, re.MULTILINE):
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), target


@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_a_mode_as_documented_keeps_padding_out(backend):
    """As the page writes a mode, keys that no row sees may hold NaN: its author is not asked to think of it."""
    (position,) = (i for i, code in enumerate(snippets(SCALINGS_PAGE)) if "class LogKeyNorm(Scaling)" in code)
    scaling = run(SCALINGS_PAGE, position)["LogKeyNorm"]()
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
