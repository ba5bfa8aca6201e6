"""The demo: its screen after a few steps, its models' layers, and the study's figures beside its own."""

import subprocess
import sys

import pytest
import torch

from perf.studies.language_model.records import RECORD, read
from tritonattn.cli import main as cli
from tritonattn.lab import demo
from tritonattn.scaling import LogKeyCount, SqrtDim


@pytest.fixture(autouse=True)
def _short(monkeypatch):
    """Four steps of training, and short sequences, of which few are held out."""
    monkeypatch.setattr(demo, "MULTIPLES", (1, 2, 4))
    monkeypatch.setattr(demo, "STEPS", 4)
    monkeypatch.setattr(demo, "_TOKENS", 2048)
    monkeypatch.setattr(demo, "held_out", demo.held_out.__wrapped__)


def test_the_screen_has_the_control_and_the_study(capsys):
    assert cli.main(["demo"]) == 0
    printed = capsys.readouterr()
    rows = {row.rsplit(None, 4)[0]: row.split()[-4:] for row in printed.out.splitlines() if row.count("%") == 4}
    assert [*rows] == ["sqrt_dim", "log_key_count:64", "ssmax:64", "sqrt_dim, then qwen_logn:64"]
    assert [row[-1] for row in rows.values()] == [f"{share:.1%}" for share in demo.STUDY.values()]
    assert rows["sqrt_dim"][0] == rows["sqrt_dim, then qwen_logn:64"][0]  # up to 64 keys they are one
    assert printed.err.count(": 4 steps, ") == 3


@pytest.mark.slow
def test_it_needs_no_extra():
    code = "import sys; sys.modules |= dict.fromkeys({'tqdm', 'transformers', 'matplotlib', 'scipy', 'sklearn'})\n"
    code += "from tritonattn.cli import main\nfrom tritonattn.lab import demo\n"
    code += "demo.MULTIPLES, demo.STEPS, demo._TOKENS = (1,), 1, 64\n"
    subprocess.run([sys.executable, "-c", f"{code}assert main.main(['demo']) == 0"], check=True)


def test_the_factor_is_in_the_layer_over_all_keys_alone():
    torch.manual_seed(0)
    tokens, asked = demo.held_out(1)
    model = demo.GPT("sqrt_dim")
    assert isinstance(model.first.attention.scaling, SqrtDim)
    assert (model.first.attention.window, model.first.attention.rotary) == ((3, 0), 10.0)
    assert (model.last.attention.window, model.last.attention.rotary) == (None, None)
    before, values = model(tokens, asked)
    assert 0 <= int(values.min()) <= int(values.max()) < demo.VALUES
    assert int(asked.sum()) == len(values)
    model.last.attention.scaling = LogKeyCount(64)
    assert not torch.allclose(model(tokens, asked)[0], before)


def test_answers_come_from_the_tokens_before():
    torch.manual_seed(0)
    model, (tokens, asked) = demo.GPT("ssmax:64"), demo.held_out(1)
    before, _ = model(tokens, asked)
    assert len(before) == int(asked.sum())  # a value at a row's end is asked for, too
    changed = torch.where(asked, (tokens + 1 - demo.NAMES) % demo.VALUES + demo.NAMES, tokens)
    last = asked & (asked.flip(1).cumsum(1).flip(1) == 1)  # each row's last value has no token after it that is read
    places = last[:, 1:][asked[:, 1:]]
    torch.testing.assert_close(model(torch.where(last, changed, tokens), asked)[0][places], before[places])


def test_the_study_s_figures_are_its_record_s():
    names = {"sqrt_dim": ("sqrt_dim", ""), "log_key_count:64": ("log_key_count", ""), "ssmax:64": ("ssmax", "")}
    names |= {"qwen_logn": ("sqrt_dim", "log n at test")}
    runs = [run for run in read(RECORD) if run.cell.name.startswith("ledger wn qk_norm=plain ")]
    runs = [run for run in runs if run.cell.shape.window == 4 and run.cell.recipe.optimizer == "adamw"]
    for name, (factor, swap) in names.items():
        of_factor = [run for run in runs if (run.cell.shape.factor.name, run.cell.shape.factor.gain) == (factor, 1.0)]
        of_factor = [run for run in of_factor if run.cell.shape.where == "global"]
        found = [run.found.results[swap]["32"]["accuracy"] for run in of_factor]
        assert len(found) == 5
        assert demo.STUDY[name] == pytest.approx(sum(found) / 5, abs=5e-4)
