"""The length study, on a small random model."""

import json

import pytest
import torch

from perf.__main__ import main
from perf.studies import length_study
from perf.studies.length_study import losses
from tests.lab.test_compare import subject
from tritonattn.huggingface import patched
from tritonattn.lab.compare.measurement import Subject
from tritonattn.lab.modes import patch_mode

MODES = "sqrt_dim,sqrt_dim*1.5,qwen_logn:CONTEXT,log_key_count:32"


@pytest.fixture
def small(monkeypatch) -> Subject:
    one = subject()  # 64 positions
    monkeypatch.setattr(length_study, "load", lambda name, device: one)
    return one


def test_the_command_writes_everything(small, tmp_path, capsys):
    main(["length-study", "--modes", MODES, "--max-tokens", "96", "--out", str(tmp_path)])
    out = capsys.readouterr().out
    assert all(part in out for part in ("qwen_logn:64", "tokens 64 to 95", "nothing before 48"))
    record = json.loads((tmp_path / "length.json").read_text())
    assert (record["context"], record["tokens"], len(record["bins"])) == (64, 96, 24)
    assert all(len(means) == 24 for means in record["loss"].values())
    assert (tmp_path / "length.png").read_bytes().startswith(b"\x89PNG")
    assert patched(small.model) is None


def test_losses_are_those_of_all_logits(small):
    tokens = torch.randint(61, (1, 300), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        logits = small.model(tokens).logits
    wanted = torch.nn.functional.cross_entropy(logits[0, :-1], tokens[0, 1:], reduction="none")
    torch.testing.assert_close(losses(small, tokens, patch_mode("sqrt_dim", 64)), wanted, rtol=1e-4, atol=1e-4)
    hotter = losses(small, tokens, patch_mode("sqrt_dim*2", 64))
    assert (hotter - wanted).abs().max() > 0.1
