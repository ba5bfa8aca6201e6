"""The pictures of the documents show what was recorded, or what the library computes."""

import pytest
import torch

pytest.importorskip("matplotlib")
pytest.importorskip("scipy")

from docs.figures import masks, studies, watch
from tritonattn.lab.simulation import plot
from tritonattn.lab.simulation.report import Findings
from tritonattn.lab.watch.curves import Watched


def test_the_masks_are_those_of_their_titles():
    seen = {title: masks.visible(**arguments) for title, arguments in masks.CALLS.items()}
    i, j = torch.arange(8)[:, None], torch.arange(8)
    assert torch.equal(seen["causal=True"], j <= i)
    assert torch.equal(seen["window=(2, 0)"], (i - 2 <= j) & (j <= i))
    assert torch.equal(seen["key_lengths=[5]"], (j < 5).expand(8, 8))
    counts = [[int(text.get_text()) for text in axes.texts if text.get_text() != "n"] for axes in masks.draw().axes]
    assert counts == [one.sum(1).tolist() for one in seen.values()]


def test_the_watched_run_is_as_the_page_tells():
    alarms = [(one.step, one.layer, one.measure, one.limit) for one in Watched.read(watch.RECORDS).alarms]
    assert alarms == [(30, "blocks.2.attention", "max_logit", 20.0), (270, "blocks.0.attention", "max_logit", 20.0)]


def test_every_point_of_the_simulation_is_in_its_panel():
    for axes in plot.two_ways(Findings.read_json(studies.DATA / "simulation.json")).axes[:16]:
        low, high = axes.get_ylim()
        assert all(low < y < high for line in axes.lines for y in line.get_ydata())
