"""The demo, on small random models everywhere and on the real one where its weights are installed."""

import json

import pytest
import torch

from tests.support.llama import llama
from tritonattn.cli import main as cli
from tritonattn.huggingface import patched
from tritonattn.lab import demo
from tritonattn.lab.demo import measurement as measuring
from tritonattn.lab.demo.measurement import Subject
from tritonattn.lab.demo.variants import variant

MODES = "sqrt_dim,key_norm_mean,key_count,key_norm_sum,none"


class Tokenizer:
    """One token a letter."""

    def __call__(self, text: str, **_) -> dict[str, torch.Tensor]:
        return {"input_ids": torch.tensor([[ord(letter) % 61 for letter in text]])}


def subject(**config) -> Subject:
    network = llama(initializer_range=0.5, **config).eval()
    return Subject("small", network, Tokenizer(), torch.device("cpu"))


@pytest.fixture
def small(monkeypatch) -> Subject:
    """A small random model in the place of the real one."""
    one = subject()
    monkeypatch.setattr(demo, "load", lambda name, device: one)
    return one


def test_the_demo_from_end_to_end(small, tmp_path, capsys):
    files = tmp_path / "new" / "a.json", tmp_path / "new" / "a.png"
    assert cli.main(f"demo --modes {MODES} --max-tokens 40 --json {files[0]} --plot {files[1]}".split()) == 0
    out = capsys.readouterr().out
    for part in (*MODES.split(","), "perplexity", "ln n", "moved", "own eager attention", "How to read it"):
        assert part in out
    record = json.loads(files[0].read_text())
    assert [row["mode"] for row in record["modes"]] == MODES.split(",")
    assert record["tokens"] == 40
    assert abs(record["sqrt_dim_minus_eager_loss"]) < 1e-4
    assert files[1].read_bytes().startswith(b"\x89PNG")
    assert small.model.config._attn_implementation == "eager"
    assert not hasattr(small.model.config, "tritonattn")


def test_statistics_against_a_dense_computation(small):
    tokens = torch.randint(61, (1, 20), generator=torch.Generator().manual_seed(1))
    got = measuring.measure(small, tokens, variant("sqrt_dim", None))
    with torch.no_grad():
        wanted = small.model(tokens, output_attentions=True, use_cache=False)
    assert len(got.layers) == 2
    for layer, weights in zip(got.layers, wanted.attentions, strict=True):
        n = torch.arange(1, 21).log()
        entropy = torch.special.entr(weights).sum(-1)[..., 1:] / n[1:]  # [1, H, S - 1]
        assert layer.entropy_over_ln_n == pytest.approx(float(entropy.mean()), abs=1e-5)
    loss = torch.nn.functional.cross_entropy(wanted.logits[0, :-1], tokens[0, 1:])
    assert got.loss == pytest.approx(float(loss), abs=1e-5)


def test_compare_from_end_to_end(small, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert cli.main("compare --max-tokens 40 --modes key_count,cosine --json a.json".split()) == 0
    out = capsys.readouterr().out
    for part in ("perplexity", "model.layers.0.self_attn", "key_count", "cosine", "of heads", "plot: compare.png"):
        assert part in out
    assert (tmp_path / "compare.png").read_bytes().startswith(b"\x89PNG")
    for row in json.loads((tmp_path / "a.json").read_text())["modes"]:
        for layer in row["layers"]:
            assert 0 <= layer["lowest_entropy_of_a_head"] <= layer["entropy_over_ln_n"] + 1e-9
            assert layer["entropy_over_ln_n"] <= layer["highest_entropy_of_a_head"] + 1e-9
            assert layer["mean_largest_logit_of_a_row"] <= layer["largest_logit"]
    assert patched(small.model) is None
