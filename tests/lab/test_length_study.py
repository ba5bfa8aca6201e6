"""The length study, on a small random model."""

import json

import pytest
import torch

from tests.lab.test_demo import subject
from tests.support.refusals import assert_refused
from tritonattn.cli import main as cli
from tritonattn.core.provenance import Environment
from tritonattn.huggingface import patched
from tritonattn.lab import length
from tritonattn.lab.demo.measurement import Subject
from tritonattn.lab.demo.variants import variant
from tritonattn.lab.length.passes import losses
from tritonattn.lab.length.report import Study

MODES = "sqrt_dim,sqrt_dim*1.5,qwen_logn:CONTEXT,log_key_count:32"


@pytest.fixture
def small(monkeypatch) -> Subject:
    one = subject()  # 64 positions
    monkeypatch.setattr(length, "load", lambda name, device: one)
    return one


def command(*arguments: str) -> int:
    return cli.main(["length-study", *arguments])


def study(**changes) -> Study:
    torch.manual_seed(0)
    base = torch.rand(99) + 1
    values = {
        "model": "m",
        "text": "t",
        "context": 60,
        "bin": 20,
        "losses": {"sqrt_dim": base, "other": base + 0.5},
        "start": 50,
        "alone": base[50:] + 0.25,
        "environment": Environment("p", 1, "3", "2", "0", "c"),
        "command": "tritonattn length-study",
        "quick": False,
        **changes,
    }
    return Study(**values)


def test_the_command_writes_everything_and_goes_on_where_it_was(small, tmp_path, capsys, monkeypatch):
    arguments = ["--modes", MODES, "--max-tokens", "96", "--out", str(tmp_path)]
    assert command(*arguments) == 0
    out = capsys.readouterr().out
    for part in ("sqrt_dim*1.5", "qwen_logn:64", "log_key_count:32", "tokens 64 to 95", "nothing before 48", "±"):
        assert part in out
    record = json.loads((tmp_path / "length.json").read_text())
    assert (record["context"], record["tokens"], len(record["bins"])) == (64, 96, 24)
    assert all(len(means) == 24 for means in record["loss"].values())
    assert (tmp_path / "length.png").read_bytes().startswith(b"\x89PNG")
    assert patched(small.model) is None

    passes = []
    monkeypatch.setattr(length, "losses", lambda s, tokens, one: passes.append(one.name) or losses(s, tokens, one))
    lines = (tmp_path / "losses.jsonl").read_text().splitlines()
    kept = [line for line in lines if "qwen_logn" not in line]
    (tmp_path / "losses.jsonl").write_text("\n".join([*kept, lines[3][:50]]))  # killed while it wrote
    assert command(*arguments) == 0
    assert passes == ["qwen_logn:64"]
    assert capsys.readouterr().out == out


def test_losses_are_those_of_all_logits(small):
    tokens = torch.randint(61, (1, 300), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        logits = small.model(tokens).logits
    wanted = torch.nn.functional.cross_entropy(logits[0, :-1], tokens[0, 1:], reduction="none")
    torch.testing.assert_close(losses(small, tokens, variant("sqrt_dim", 64)), wanted, rtol=1e-4, atol=1e-4)
    hotter = losses(small, tokens, variant("sqrt_dim*2", 64))
    assert (hotter - wanted).abs().max() > 0.1


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        ("--modes sqrt_dim,no_such", ["--modes", "'no_such'", "llama4"]),
        ("--modes sqrt_dim:7", ["--modes", "base", "'sqrt_dim:7'"]),
        ("--modes qwen_logn:many", ["--modes", "'qwen_logn:many'"]),
        ("--modes qwen_logn:0", ["--modes", "'qwen_logn:0'"]),
        ("--modes sqrt_dim*1.2.3", ["--modes", "'sqrt_dim*1.2.3'"]),
        ("--max-tokens 1", ["--max-tokens", "at least 2"]),
        ("--bin 0", ["--bin", "at least 2"]),
        ("--text /no/such/file", ["--text", "/no/such/file"]),
        ("--device no_such_device", ["--device", "no_such_device"]),
        (f"--out {__file__}", ["--out", "folder"]),
    ],
)
def test_wrong_usage_is_named_before_a_model_is_loaded(arguments, parts, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(length, "load", lambda *_: pytest.fail("loaded"))
    assert_refused(capsys, f"length-study --out {tmp_path / 'out'} {arguments}", parts)
