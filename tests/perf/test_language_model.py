"""The study of language models: its attention is the library's, its ledger can be answered, its command goes on."""

from typing import Any, cast

import pytest
import torch

import tritonattn
from perf.studies.language_model.cells import LOG, SQRT, TEXT
from perf.studies.language_model.model import GPT, Factor, Shape, Swap, rotated, swapped
from perf.studies.language_model.records import Run
from perf.studies.language_model.report import text_rows
from perf.studies.language_model.training import Cell, Outcome
from tritonattn.lab.ledger import FILLERS, NAMES, VALUES, ledger


@pytest.mark.parametrize("factor", [Factor(), Factor(gain=2.0), Factor("log_key_count"), Factor("ssmax")], ids=str)
@pytest.mark.parametrize("where", ["global", "all"])
@pytest.mark.parametrize("length", [64, 512])
def test_attention_is_that_of_the_library(factor, where, length):
    torch.manual_seed(0)
    model = GPT(Shape("wnrp", factor, where, window=5), 8, 64, 1.0)
    for layer in model.attention:
        q, k, v = layer.heads_of(torch.randn(2, length, 64))
        has_factor = layer.kind != "w" or where == "all"
        scaling = {
            "sqrt_dim": "sqrt_dim",
            "log_key_count": tritonattn.SCALINGS["log_key_count"](64),
            "ssmax": tritonattn.nn.SSMax(2, 64),
        }[factor.name if has_factor else "sqrt_dim"]
        masks = {"causal": True, "window": (4, 0) if layer.kind == "w" else None}
        gain = factor.gain if has_factor else None
        expected = tritonattn.attention(q, k, v, scaling=scaling, gain=gain, **masks)
        torch.testing.assert_close(layer.attend(q, k, v), expected, rtol=1e-4, atol=1e-5)


def test_a_change_at_test_is_the_library_s_and_goes_back():
    torch.manual_seed(0)
    model = GPT(Shape("wr"), 8, 64, 1.0)
    x = torch.randn(1, 256, 64)
    windowed, whole = model.attention
    before = [layer(x) for layer in model.attention]
    with swapped(model, Swap("", Factor("qwen_logn"), stretch=True), 4, 64):
        q, k, v = whole.heads_of(x)
        bare = whole.qkv(x).unflatten(-1, (3, 2, 32)).permute(2, 0, 3, 1, 4)[0]
        bare = torch.nn.functional.rms_norm(bare, (32,))
        torch.testing.assert_close(q, rotated(bare, 10_000.0 * 4 ** (32 / 30)))
        expected = tritonattn.attention(q, k, v, scaling=tritonattn.SCALINGS["qwen_logn"](64), causal=True)
        torch.testing.assert_close(whole.attend(q, k, v), expected, rtol=1e-4, atol=1e-5)
        assert not torch.allclose(whole(x), before[1])
        assert torch.equal(windowed(x), before[0])
    assert torch.equal(whole(x), before[1])


def test_a_quarter_of_the_channels_is_turned_and_its_base_stretched():
    torch.manual_seed(0)
    model = GPT(Shape("wp"), 8, 64, 1.0)
    x, layer = torch.randn(1, 256, 64), model.layers[1]
    bare = torch.nn.functional.rms_norm(layer.qkv(x).unflatten(-1, (3, 2, 32)).permute(2, 0, 3, 1, 4)[0], (32,))
    with swapped(model, Swap("", stretch=True), 4, 64):
        q = layer.heads_of(x)[0]
    torch.testing.assert_close(q[..., 8:], bare[..., 8:])
    turns = torch.arange(256)[:, None] * (10_000.0 * 4 ** (8 / 6)) ** (-torch.arange(4) / 4)
    wanted = torch.view_as_complex(torch.stack(bare[..., :8].chunk(2, -1), -1)) * torch.polar(torch.ones(256, 4), turns)
    torch.testing.assert_close(torch.view_as_complex(torch.stack(q[..., :8].chunk(2, -1), -1)), wanted)


def test_a_ledger_repeats_the_values_of_names_that_come_again():
    tokens, asked = ledger(32, 200, torch.Generator().manual_seed(0))
    shares = []
    for row, wanted in zip(tokens.tolist(), asked.tolist(), strict=True):
        known, place = {}, 0
        while place < len(row) - 1:
            if row[place] >= NAMES + VALUES:
                assert row[place] < NAMES + VALUES + FILLERS
                assert not wanted[place]
                place += 1
                continue
            name, value = row[place : place + 2]
            assert name < NAMES <= value < NAMES + VALUES
            assert wanted[place + 1] == (name in known)
            assert not wanted[place]
            assert known.setdefault(name, value) == value
            place += 2
        shares.append(sum(wanted) / len(row))
    assert 0.1 < min(shares) < 0.2 < max(shares) < 0.45


def test_losses_on_text_stand_beside_those_of_sqrt_dim_with_the_same_seed():
    def run(factor, seed, *swaps):
        cell = Cell("code", Shape("wnwn", factor), TEXT, seed)
        results = {
            name: {"1": {"by_position": {"0-64": 0.0, "64-128": 0.0}}, "32": {"by_position": {"0-64": a, "64-128": b}}}
            for name, a, b in swaps
        }
        return Run(cell, Outcome(None, 1, 0.0, 0.0, results=results), cast(Any, None), "")

    runs = [
        run(SQRT, 0, ("", 4.0, 3.0), ("log n at test", 4.5, 2.5)),
        run(LOG, 0, ("", 3.0, 3.5)),
        run(SQRT, 1, ("", 5.0, 2.0), ("log n at test", 5.0, 1.0)),
        run(LOG, 1, ("", 5.0, 2.25)),
    ]
    assert text_rows(runs) == (
        ["layers, QK-norm", "factor", "seeds", "0-64", "64-128"],
        [
            ["wnwn, QK-norm", "**`sqrt_dim`**", "2", "4.500", "2.500"],
            ["", "log n at test", "2", "+0.250", "-0.750 (-1.000 to -0.500)"],
            ["", "**`log_key_count`**", "2", "-0.500", "+0.375 (+0.250 to +0.500)"],
        ],
    )
