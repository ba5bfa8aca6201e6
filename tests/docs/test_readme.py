"""The README fits a screen, its Python runs, its tables are the package's; the mode in the documents is a good one."""

import json
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


@pytest.mark.parametrize("document", ["README.md", SCALINGS_PAGE])
def test_every_mode_is_in_the_table(document):
    text = (ROOT / document).read_text(encoding="utf-8").partition("## Modes")[2].partition("\n## ")[0]
    assert re.findall(r"^\| `(\w+)`", text, re.MULTILINE) == list(tritonattn.SCALINGS)


def test_its_recall_is_that_of_the_recorded_runs():
    lines = (ROOT / "docs/data/training/runs-recall.jsonl").read_text(encoding="utf-8").splitlines()
    recalls: dict[str, list[float]] = {}
    for run_ in map(json.loads, lines):
        recalls.setdefault(run_["mode"], []).append(run_["metrics"]["accuracy_4096"])
    mean = {mode: f"{sum(values) / len(values):.0%}" for mode, values in recalls.items()}
    assert (mean["log_key_count"], mean["ssmax"], mean["sqrt_dim"]) == ("82%", "82%", "76%")
    assert "recalls 82%" in README
    assert "with `sqrt_dim` 76%" in README
