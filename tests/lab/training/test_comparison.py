"""The command train-compare: files, tables, intervals, and what is refused."""

from dataclasses import replace

import pytest
import torch

pytest.importorskip("sklearn", reason="pip install 'tritonattn[lab]'")

from scipy import stats

from tritonattn.cli import main as cli
from tritonattn.core.provenance import Environment
from tritonattn.lab import training
from tritonattn.lab.training import report
from tritonattn.lab.training.interval import Interval
from tritonattn.lab.training.records import Recipe, Run, read

ENVIRONMENT = Environment("a processor", 1, "3.11", "2.13", "0.1.0", "abc")
RECIPE = Recipe("adamw", 1e-2, 0.01, 3, 4)


def a_run(mode: str = "sqrt_dim", seed: int = 0, metric: float = 0.9, **changes) -> Run:
    origin = {"recipe": RECIPE, "environment": ENVIRONMENT, "command": "c", "date": "2026-01-01", "data": "d"}
    curves = {"steps": [1, 2], "train_loss": [2.0, 1.0], "held_out_loss": [2.0, 1.5], "entropy": {"a": [0.9, 0.5]}}
    curves["gradients"] = {"a qk": [0.1, 0.2], "a vo": [1.0, 1.0]}
    outcome = {"status": "trained", "quick": False, "seconds": 1.0, "steps_to_target": 2}
    own = Run(task="digits", mode=mode, seed=seed, metrics={"accuracy": metric}, **origin, **curves, **outcome)
    return replace(own, **changes)


def test_the_command_writes_everything_and_goes_on_where_it_was(tmp_path, capsys, monkeypatch):
    arguments = ["train-compare", "--tasks", "digits", "--modes", "sqrt_dim,power_law", "--seeds", "2", "--steps", "2"]
    arguments += ["--out", str(tmp_path)]
    assert cli.main(arguments) == 0
    out = capsys.readouterr().out
    for part in ("sqrt_dim", "power_law", "accuracy", "±", "exponent of n", "nearest mode", "2 seeds"):
        assert part in out
    assert (tmp_path / "runs.md").read_text() == out
    assert (tmp_path / "digits.png").read_bytes().startswith(b"\x89PNG")
    runs = read(tmp_path / "runs-digits.jsonl")
    assert [(run.seed, run.mode) for run in runs] == [(s, m) for s in (0, 1) for m in ("sqrt_dim", "power_law")]
    assert runs[0].environment.torch == torch.__version__
    assert runs[0].command

    trained, real = [], training.train
    monkeypatch.setattr("tritonattn.lab.training.plot.draw", lambda *_: None)
    monkeypatch.setattr(training, "train", lambda one, tick: trained.append((one.seed, one.mode)) or real(one, tick))
    lines = (tmp_path / "runs-digits.jsonl").read_text().splitlines()
    torn = "\n".join([*lines[:2], lines[2][:40]])  # killed while it wrote the third
    (tmp_path / "runs-digits.jsonl").write_text(torn)
    assert cli.main(arguments) == 0
    assert trained == [(1, "sqrt_dim"), (1, "power_law")]
    captured = capsys.readouterr()
    assert captured.out == out
    assert "skipped" in captured.err


def test_the_interval_is_students():
    values = [0.91, 0.93, 0.88, 0.97, 0.90]
    own = Interval.of(values)
    low, high = stats.t.interval(0.95, 4, loc=own.mean, scale=stats.sem(values))
    assert (own.mean - own.half, own.mean + own.half) == pytest.approx((low, high), rel=1e-12)
    assert Interval.of([1.0, 3.0]).half == pytest.approx(12.706, abs=1e-3)  # t's quantile 0.975, 1 degree of freedom
    assert Interval.of([2.0]).text() == "2.000 ± ?"
    assert not Interval.of([-1.0, 3.0]).excludes_zero
    assert Interval.of([2.9, 3.0]).excludes_zero


def test_differences_are_paired_by_seed():
    runs = [a_run(seed=seed, metric=x) for seed, x in enumerate((0.5, 0.7, 0.9))]
    runs += [a_run("power_law", seed, x + 0.01 + 0.001 * seed) for seed, x in enumerate((0.5, 0.7, 0.9))]
    row = next(line for line in report.comparison(runs).splitlines() if "power_law" in line)
    cells = [cell.strip() for cell in row.split("|")]
    assert cells[3] == "+0.011 ± 0.002 *"
    assert cells[2].startswith("0.711 ± ")
