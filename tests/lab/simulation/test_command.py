"""`tritonattn simulate` as a command: tables, JSON, pictures, and what it refuses."""

import json
from itertools import product

import pytest
import torch

from tests.support.refusals import assert_refused
from tritonattn.cli import main as cli
from tritonattn.lab.simulation import command, plot
from tritonattn.lab.simulation.report import Findings

TINY = ["--modes", "sqrt_dim,key_norm_sum,cosine", "--counts", "2,40", "--dims", "4,6", "--keys", "gaussian,few giants"]


@pytest.fixture(autouse=True)
def few_sequences(monkeypatch):
    monkeypatch.setattr(command, "_FEW_SETS", 1)
    monkeypatch.setattr(command, "CONDITIONS", command.CONDITIONS[:2])


def simulate(*arguments):
    return cli.main(["simulate", "--quick", *TINY, *arguments])


def test_everything(tmp_path, capsys):
    file, folder = tmp_path / "a.json", tmp_path / "plots"
    assert simulate("--json", str(file), "--plot", str(folder), "--seed", "3") == 0
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
    assert judged == set(product(("homogeneous", "counts vary 2-fold"), ("sqrt_dim", "key_norm_sum", "cosine")))
    names = {"paper_figure_1", "paper_figure_2", "by_count", "by_dim", "by_keys", "two_ways", "verdict"}
    assert {path.name for path in folder.iterdir()} == {f"{name}.png" for name in names}
    assert all(path.stat().st_size > 5000 for path in folder.iterdir())


def test_modes_that_coincide_share_a_line(tmp_path, monkeypatch):
    pictures = {}
    monkeypatch.setattr(plot, "save", lambda figure, file: pictures.setdefault(file.stem, figure))
    modes = ["--modes", "sqrt_dim,key_norm_sum,llama4", "--counts", "2,40", "--dims", "4", "--keys", "gaussian"]
    assert cli.main(["simulate", "--parts", "sweep", *modes, "--json", str(tmp_path / "a.json")]) == 0
    plot.draw_all(Findings.read_json(tmp_path / "a.json"), tmp_path)
    labels = [text.get_text() for text in pictures["by_count"].legends[0].get_texts()]
    assert labels == ["sqrt_dim, llama4", "key_norm_sum"]
    assert all(len(axes.lines) == 2 for axes in pictures["by_count"].axes)
    assert [axes.get_title() for axes in pictures["two_ways"].axes] == ["sqrt_dim", "key_norm_sum", "llama4"]


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        ("--modes sqrt_dim,nope", ["--modes", "'nope'", "key_norm_sum"]),
        ("--modes ,", ["--modes", "nothing"]),
        ("--parts papers", ["--parts", "'papers'", "paper, sweep, verdict"]),
        ("--counts 1", ["--counts", "from 2 to 1048576", "'1'"]),
        ("--counts 8,99999999999", ["--counts", "'99999999999'"]),
        ("--seed -1", ["--seed", "-1"]),
        ("--counts 8,x", ["--counts", "'x'"]),
        ("--counts ,", ["--counts", "nothing"]),
        ("--dims 0", ["--dims", "from 1", "'0'"]),
        ("--dims -4", ["--dims", "'-4'"]),
        ("--keys gauss", ["--keys", "'gauss'", "few giants"]),
        ("--device nowhere", ["--device", "nowhere"]),
        ("--json /dev/null/a.json", ["--json", "/dev/null"]),
        (f"--plot {__file__}", ["--plot", "test_command.py"]),
    ],
)
def test_wrong_usage_is_named_before_any_work(arguments, parts, capsys):
    assert_refused(capsys, f"simulate {arguments}", parts)


@pytest.mark.parametrize(
    ("arguments", "needs"), [("simulate --plot x", "simulate needs tqdm, matplotlib;"), ("train-compare", "sklearn")]
)
def test_a_missing_extra_is_named(arguments, needs, monkeypatch, capsys):
    monkeypatch.setattr("tritonattn.cli.options.find_spec", lambda name: None)
    assert_refused(capsys, arguments, [needs, "to mend it: pip install 'tritonattn[lab]'"])
