"""`tritonattn simulate` as a command: tables, JSON, pictures, and what it refuses."""

import json
from itertools import product

import pytest
import torch

from tritonattn.cli import main as cli
from tritonattn.lab.simulation import command, plot
from tritonattn.lab.simulation.report import Findings

TINY = ["--modes", "sqrt_dim,key_norm_sum,cosine", "--counts", "2,40", "--dims", "4,6", "--keys", "gaussian,few giants"]


@pytest.fixture
def pictures(monkeypatch):
    """Figures by the name of their file, which is not written."""
    found = {}
    monkeypatch.setattr(plot, "save", lambda figure, file: found.setdefault(file.stem, figure))
    return found


def test_everything(pictures, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(command, "_FEW_SETS", 1)
    monkeypatch.setattr(command, "CONDITIONS", command.CONDITIONS[1:2])
    file, folder = tmp_path / "a.json", tmp_path / "plots"
    arguments = ["simulate", "--quick", *TINY, "--json", str(file), "--plot", str(folder), "--seed", "3"]
    assert cli.main(arguments) == 0
    printed = capsys.readouterr().out
    for part in (
        "32 keys, 500 queries",
        "entropy / ln n, by number of keys",
        "by kind of keys; n = 40, d = 4",
        "by dimension; gaussian keys, n = 40",
        "Reach with that gain",
        "seed 3",
    ):
        assert part in printed
    record = json.loads(file.read_text())
    assert record["seed"] == 3
    assert record["environment"]["torch"] == torch.__version__
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


def test_modes_that_coincide_share_a_line(pictures, tmp_path):
    modes = ["--modes", "sqrt_dim,key_norm_sum,llama4", "--counts", "2,40", "--dims", "4", "--keys", "gaussian"]
    assert cli.main(["simulate", "--parts", "sweep", *modes, "--json", str(tmp_path / "a.json")]) == 0
    plot.draw_all(Findings.read_json(tmp_path / "a.json"), tmp_path)
    labels = [text.get_text() for text in pictures["by_count"].legends[0].get_texts()]
    assert labels == ["sqrt_dim, llama4", "key_norm_sum"]
    assert all(len(axes.lines) == 2 for axes in pictures["by_count"].axes)
    assert [axes.get_title() for axes in pictures["two_ways"].axes] == ["sqrt_dim", "key_norm_sum", "llama4"]
