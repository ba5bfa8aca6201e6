"""The checks on models see the faults that they are there for."""

from __future__ import annotations

import pytest
import torch

import tritonattn
from tests.huggingface.architectures import ARCHITECTURES
from tests.huggingface.checks import equals_eager, padding_changes_nothing
from tritonattn.core.visibility import Visibility
from tritonattn.huggingface import attention as forward
from tritonattn.huggingface import masks

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")


@pytest.mark.parametrize("name", ["llama", "gemma2", "gpt2", "bart"])
def test_a_wrong_scale(name, monkeypatch):
    def stretched(q, k, v, *, gain=None, **rest):
        return tritonattn.attention(q, k, v, gain=1.3 if gain is None else 1.3 * gain, **rest)

    equals_eager(ARCHITECTURES[name], "none")
    monkeypatch.setattr(forward, "attention", stretched)
    with pytest.raises(AssertionError):
        equals_eager(ARCHITECTURES[name], "none")


@pytest.mark.parametrize("name", ["mistral", "gemma3", "phi3"])
@pytest.mark.parametrize("off", [-1, 1])
def test_a_window_off_by_one(name, off, monkeypatch):
    window = masks._RULES["window"]
    monkeypatch.setitem(masks._RULES, "window", lambda position, size: window(position, size + off))
    with pytest.raises(AssertionError):
        equals_eager(ARCHITECTURES[name], "none")


# Right padding lies behind all rows that count in a causal model.
PADDED = [("llama", "left"), ("gpt2", "left"), ("bart", "left"), ("bart", "right")]
PADDED = [(name, padding) for name, padding in PADDED if not ARCHITECTURES[name].makes_own_masks]


@pytest.mark.parametrize(("name", "padding"), PADDED)
def test_dropped_padding(name, padding, monkeypatch):
    monkeypatch.setattr(masks, "_padding_state", lambda request: ("none", None))
    with pytest.raises(AssertionError):
        equals_eager(ARCHITECTURES[name], padding)


@pytest.mark.parametrize("where", ["prefill", "steps"])
def test_statistics_that_count_padding(where, monkeypatch):
    original = Visibility.sum

    def from_the_first_key(self, x, scan):
        if (self.q_len == 1) is (where == "prefill"):
            return original(self, x, scan)
        _, hi = self.ranges()
        return x.cumsum(-1, dtype=torch.float64).gather(2, (hi - 1)[:, None].clamp(min=0).expand(*x.shape[:2], -1))

    padding_changes_nothing(ARCHITECTURES["llama"], "key_norm_mean")
    monkeypatch.setattr(Visibility, "sum", from_the_first_key)
    monkeypatch.setattr(Visibility, "seen_keys", lambda self: torch.ones(self.keys, dtype=torch.bool))
    with pytest.raises(AssertionError):
        padding_changes_nothing(ARCHITECTURES["llama"], "key_norm_mean")
