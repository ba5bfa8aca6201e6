"""The command `compare` on small random models, and the look that pictures share."""

import json

import pytest
import torch
from matplotlib.figure import Figure

import tritonattn
from tests.support.llama import llama
from tritonattn.cli import main as cli
from tritonattn.core.errors import CommandError
from tritonattn.huggingface import patched
from tritonattn.lab import compare
from tritonattn.lab.compare import measurement as measuring
from tritonattn.lab.compare import plot
from tritonattn.lab.compare.measurement import Layer, Measurement, Subject
from tritonattn.lab.figures import COLOURS, foot, styles
from tritonattn.lab.modes import patch_mode
from tritonattn.scaling import Cosine, LogKeyCount, LogPower, SqrtDim


class Tokenizer:
    """One token a letter."""

    def __call__(self, text: str, **_) -> dict[str, torch.Tensor]:
        return {"input_ids": torch.tensor([[ord(letter) % 61 for letter in text]])}


def subject(**config) -> Subject:
    network = llama(initializer_range=0.5, **config).eval()
    return Subject("small", network, Tokenizer(), torch.device("cpu"))


@pytest.fixture
def small(monkeypatch) -> Subject:
    """A small random model instead of the real one."""
    one = subject()
    monkeypatch.setattr(compare, "load", lambda name, device: one)
    return one


def test_the_command_prints_writes_and_draws(small, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    chosen = "compare --modes key_count,none --max-tokens 40"
    assert cli.main(f"{chosen} --json new/a.json --plot new/a.png".split()) == 0
    assert "How to read it" in capsys.readouterr().out
    assert cli.main(f"{chosen} --json a.json".split()) == 0
    out = capsys.readouterr().out
    assert all(part in out for part in ("perplexity", "model.layers.0.self_attn", "of heads", "plot: compare.png"))
    record, same = (json.loads((tmp_path / file).read_text()) for file in ("new/a.json", "a.json"))
    assert [row["mode"] for row in record["modes"]] == ["sqrt_dim", "key_count", "none"]
    assert [row["loss"] for row in record["modes"]] == [row["loss"] for row in same["modes"]]
    assert record["tokens"] == 40
    assert abs(record["sqrt_dim_minus_eager_loss"]) < 1e-4
    assert all((tmp_path / file).read_bytes().startswith(b"\x89PNG") for file in ("new/a.png", "compare.png"))
    for layer in (layer for row in record["modes"] for layer in row["layers"]):
        assert 0 <= layer["lowest_entropy_of_a_head"] <= layer["entropy_over_ln_n"] + 1e-9
        assert layer["entropy_over_ln_n"] <= layer["highest_entropy_of_a_head"] + 1e-9
        assert layer["mean_largest_logit_of_a_row"] <= layer["largest_logit"]
    assert patched(small.model) is None
    assert small.model.config._attn_implementation == "eager"


def test_statistics_against_a_dense_computation(small):
    tokens = torch.randint(61, (1, 20), generator=torch.Generator().manual_seed(1))
    got = measuring.measure(small, tokens, patch_mode("sqrt_dim", None))
    with torch.no_grad():
        wanted = small.model(tokens, output_attentions=True, use_cache=False)
    assert len(got.layers) == 2
    for layer, weights in zip(got.layers, wanted.attentions, strict=True):
        n = torch.arange(1, 21).log()
        entropy = torch.special.entr(weights).sum(-1)[..., 1:] / n[1:]  # [1, H, S - 1]
        assert layer.entropy_over_ln_n == pytest.approx(float(entropy.mean()), abs=1e-5)
    loss = torch.nn.functional.cross_entropy(wanted.logits[0, :-1], tokens[0, 1:])
    assert got.loss == pytest.approx(float(loss), abs=1e-5)


@pytest.mark.parametrize(
    ("text", "name", "like"),
    [
        ("ssmax:CONTEXT", "ssmax:64", LogKeyCount(64)),  # the trained length
        ("ssmax:9*2", "ssmax:9*2", LogKeyCount(9)),
        ("log_key_count", "log_key_count:64", LogKeyCount(64)),
        ("log_key_count(9)", "log_key_count:9", LogKeyCount(9)),  # as `advise` writes it
        ("log_power", "log_power:64", LogPower(base=64)),
        ("learned_log_power:CONTEXT", "learned_log_power:64", LogPower(base=64)),
        ("power_law", "power_law", SqrtDim()),
        ("learned_cosine", "learned_cosine", Cosine()),
    ],
)
def test_a_written_mode_is_the_scaling_as_training_would_begin(text, name, like, small):
    one = patch_mode(text, small.context)
    assert (one.name, one.gain) == (name, 2.0 if "*" in text else None)
    q, k, v = torch.randn(3, 1, 4, 9, 8, dtype=torch.float64).unbind(0)
    ours, wanted = (tritonattn.attention(q, k, v, scaling=x, causal=True) for x in (one.scaling(4, 8), like))
    torch.testing.assert_close(ours, wanted, rtol=1e-6, atol=1e-6)
    with measuring.patched_with(small, one) as patch:
        assert len(patch.layers) == 2


def test_a_mode_that_needs_a_trained_length_asks_for_it():
    with pytest.raises(CommandError, match=r"--modes: expected a base in 'log_power\*2', .*: log_power:BASE"):
        patch_mode("log_power*2", None)
    with pytest.raises(CommandError, match=r"--modes: expected ssmax:CONTEXT or ssmax:BASE, got 'ssmax', which starts"):
        patch_mode("ssmax", 64)
    assert patch_mode("ssmax:9", None).name == "ssmax:9"


PROVENANCE = "Measured: Some(R) Long Processor (1 thread), torch 2.13, `python -m tritonattn " + "--option value " * 30


def drawn() -> Figure:
    figure = Figure(figsize=(6, 4), layout="constrained")
    figure.subplots().plot([1, 2], [1, 2])
    return figure


@pytest.mark.parametrize("legend", [None, 1, 12])
def test_the_source_is_whole_and_covers_nothing(legend, tmp_path):
    figure = drawn()
    foot(figure, PROVENANCE, None if legend is None else styles(map(str, range(legend))))
    figure.savefig(tmp_path / "a.png")
    (text,) = (text for text in figure.texts if text.get_text())
    assert " ".join(text.get_text().split()) == " ".join(PROVENANCE.split())
    page, box = figure.bbox, text.get_window_extent()
    assert page.x0 <= box.x0 < box.x1 <= page.x1
    assert page.y0 <= box.y0
    others = [figure.axes[0].get_tightbbox(), *(one.get_window_extent() for one in figure.legends)]
    assert all(box.y1 <= other.y0 for other in others)
    assert not figure.legends or figure.legends[0].get_window_extent().y1 <= others[0].y0


@pytest.mark.parametrize(
    ("names", "numbers"),
    [([""] * 3, [0, 1, 2]), (["model.layers.3.self_attn", "model.layers.28.self_attn"], [3, 28])],
    ids=["without numbers", "some layers"],
)
def test_layers_of_a_model_have_their_numbers_on_whole_ticks(names, numbers):
    measurements = [
        Measurement(mode, loss, tuple(Layer(name, 0.5, 3.0) for name in names), 0.0)
        for mode, loss in (("sqrt_dim", 3.25), ("key_count", 7.5))
    ]
    losses, entropies, logits = plot.figure_of("small", measurements, "where").axes
    for axes in (entropies, logits):
        assert all(list(line.get_xdata()) == numbers for line in axes.lines)
        assert all(tick == round(tick) for tick in axes.get_xticks())
    assert {"3.250", "7.500"} <= {text.get_text() for text in losses.texts}
    assert COLOURS[0] == losses.lines[0].get_color()
