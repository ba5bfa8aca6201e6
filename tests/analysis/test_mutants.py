"""Tests of the tests: a Monitor with a fault is found out."""

from __future__ import annotations

import sys

import pytest

from tests.analysis import test_monitor, test_monitor_model, test_qk_clip
from tritonattn.analysis import tally, watch

pytestmark = test_monitor.pytestmark
_sums, _square = tally._sums, tally._square


def numbers():
    test_monitor.test_numbers_against_a_dense_computation(causal=True, backend="auto")


def padding():
    test_monitor.test_padding_and_accumulation_say_what_the_sequences_say_alone("sdpa", "right")


def checkpointing():
    test_monitor_model.test_checkpointed_layers_count_once("eager", False)


def unnormalised(call):
    n = call.visibility.counts().clamp(min=2).log().mean()
    return {**_sums(call), "entropy": _sums(call)["entropy"] * n}


FAULTS = {
    "padding counts": (tally, "counted_rows", lambda call: call.visibility.counts() > 0, [numbers, padding]),
    "heads reversed": (tally, "_sums", lambda call: {name: x.flip(0) for name, x in _sums(call).items()}, [numbers]),
    "entropy without ln n": (tally, "_sums", unnormalised, [numbers]),
    "gradient norm not squared": (tally, "_square", lambda g: _square(g).sqrt(), [numbers]),
    "gradient heads joined": (tally, "_square", lambda g: _square(g).mean().expand(g.shape[1]), [numbers]),
    "recomputed layers count": (watch, "_in_backward", lambda: False, [checkpointing]),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_is_found(fault, monkeypatch):
    owner, name, broken, tests = FAULTS[fault]
    for test in tests:
        test()
    monkeypatch.setattr(owner, name, broken)
    for test in tests:
        with pytest.raises((AssertionError, RuntimeWarning, KeyError)):
            test()


@pytest.mark.parametrize(
    "broken",
    [
        lambda rows, factor: rows.mul_(factor.prod()),
        lambda rows, factor: rows.mul_(factor.flip(0).repeat_interleave(rows.shape[0] // len(factor))[:, None]),
        lambda rows, factor: None,
    ],
    ids=["all heads alike", "other heads", "nothing"],
)
@pytest.mark.parametrize("kv_heads", [4, 2])
def test_a_wrong_clip_is_found(broken, kv_heads, monkeypatch):
    def multiply(rows, factor):
        broken(rows if rows.dim() > 1 else rows[:, None], factor.to(rows.dtype))

    monkeypatch.setattr(sys.modules["tritonattn.analysis.qk_clip"], "_multiply", multiply)
    with pytest.raises(AssertionError):
        test_qk_clip.test_scaled_attention("sqrt_dim", kv_heads)
