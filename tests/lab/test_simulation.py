"""`tritonattn simulate`: the paper's numbers, the sweep's measures, the verdict by its definition, and the command."""

import json
import re
from itertools import product

import pytest
import torch

from docs.figures.studies import simulated
from tritonattn import attention
from tritonattn.cli import main as cli
from tritonattn.lab import figures
from tritonattn.lab.simulation import command, plot
from tritonattn.lab.simulation.measures import Point, Sample, measure
from tritonattn.lab.simulation.verdict import Batch, Condition, Curves, reach_of

CPU = torch.device("cpu")


@pytest.mark.parametrize("mode", ["sqrt_dim", "key_norm_sum", "cosine", "log_key_count"])
@pytest.mark.parametrize("keys", ["gaussian", "log-normal", "half zeros"])
def test_gradients_are_those_of_the_reference(mode, keys):
    sample = Sample.of(Point(keys, 300, 8), 1, CPU)
    q, k = sample.q.clone().requires_grad_(), sample.k.clone().requires_grad_()
    out = attention(q, k, sample.v, scaling=mode, backend="reference")
    (out * sample.weights).sum().backward()
    ours = measure(sample, mode)
    assert ours.q_gradient == pytest.approx(q.grad.norm(dim=-1).mean().item(), rel=1e-9)
    assert ours.k_gradient == pytest.approx((k.grad.square().sum((1, 2, 3)) / 32).sqrt().mean().item(), rel=1e-9)


@pytest.fixture(scope="module")
def batches():
    """Batches with the curves of their rows."""
    drawn = {one.name: Batch.of(one, 4, 0, CPU) for one in (Condition("same"), Condition("counts", fold=16))}
    return {name: (batch, Curves(batch, "none")) for name, batch in drawn.items()}


def test_sums_of_norms_lose_where_counts_vary(batches):
    plain, sums, means = (
        reach_of(batches["counts"][0], mode, batches["counts"][1])
        for mode in ("sqrt_dim", "key_norm_sum", "key_norm_mean")
    )
    assert sums.tuned < plain.tuned - 0.05
    assert sums.unevenness > 3 * plain.unevenness
    assert means.tuned == pytest.approx(plain.tuned, abs=1e-6)


TINY = ["--modes", "sqrt_dim,key_norm_sum,cosine", "--counts", "2,40", "--dims", "4,6", "--keys", "gaussian,few giants"]


@pytest.fixture
def pictures(monkeypatch):
    """Figures by the name of their file, which is not written."""
    found = {}
    monkeypatch.setattr(figures, "save", lambda figure, file: found.setdefault(file.stem, figure))
    return found


def test_everything(pictures, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(command, "_FEW_SETS", 1)
    monkeypatch.setattr(command, "CONDITIONS", command.CONDITIONS[1:2])
    file, folder = tmp_path / "a.json", tmp_path / "plots"
    arguments = ["simulate", "--quick", *TINY, "--json", str(file), "--plot", str(folder), "--seed", "3"]
    assert cli.main(arguments) == 0
    printed = capsys.readouterr().out
    parts = (
        "entropy / ln n, by number of keys",
        "by distribution of keys; n = 40, d = 4",
        "gaussian keys, n = 40",
        "seed 3",
    )
    assert all(part in printed for part in parts)
    record = json.loads(file.read_text())
    assert (record["seed"], record["environment"]["torch"]) == (3, torch.__version__)
    assert len(record["paper"]) == 6
    points = record["sweep"]["points"]
    wanted = [*product(("gaussian",), (4, 6), (2, 40)), *product(("few giants",), (4,), (2, 40))]
    assert [(x["keys"], x["dim"], x["count"]) for x in points] == wanted
    for point in points:
        assert list(point["modes"]) == ["sqrt_dim", "key_norm_sum", "cosine"]
        for values in point["modes"].values():
            found = dict(zip(record["sweep"]["measures"], values, strict=True))
            assert 1 / point["count"] <= found["max_probability"] <= 1
            assert 0 <= found["relative_entropy"] <= 1
    judged = {(x["name"], x["mode"]) for x in record["verdict"]}
    assert judged == set(product(["counts vary 2-fold"], ("sqrt_dim", "key_norm_sum", "cosine")))
    names = {"paper_figure_1", "paper_figure_2", "by_count", "by_dim", "by_keys", "two_ways", "verdict"}
    assert pictures.keys() == names


def test_modes_that_coincide_share_a_line(tmp_path):
    modes = ["--modes", "sqrt_dim,key_norm_sum,llama4", "--counts", "2,40", "--dims", "4", "--keys", "gaussian"]
    assert cli.main(["simulate", "--parts", "sweep", *modes, "--json", str(tmp_path / "a.json")]) == 0
    pictures = plot.figures_of(simulated(tmp_path / "a.json"))
    labels = [text.get_text() for text in pictures["by_count"].legends[0].get_texts()]
    assert labels == ["sqrt_dim, llama4", "key_norm_sum"]
    assert all(len(axes.lines) == 2 for axes in pictures["by_count"].axes)
    titles = [axes.get_title().splitlines() for axes in pictures["two_ways"].axes]
    assert [mode for mode, _ in titles] == ["sqrt_dim", "key_norm_sum", "llama4"]
    assert all(re.fullmatch(r"\d+% uniform, \d+% one-hot", shares) for _, shares in titles)
