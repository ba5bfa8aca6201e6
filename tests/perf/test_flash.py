"""`python -m perf flash`, and "auto" on a card whose table names a library."""

from dataclasses import replace
from functools import wraps

import pytest
import torch

pytest.importorskip("triton")
import tritonattn
from perf.gpu import flash as command
from perf.gpu import flash_checks
from tests.support import flash
from tritonattn.backends import choice
from tritonattn.backends.flash import libraries
from tritonattn.calls import dispatch
from tritonattn.tuning import cache_dir, lookup
from tritonattn.tuning.config import Target

FOUR, CPU = "flash-attn-4 4.0.0b36", torch.device("cpu")
H100, H200 = (Target("cuda", "90", name) for name in ("NVIDIA H100 80GB HBM3", "NVIDIA H200"))


@pytest.fixture
def stand_in(monkeypatch, tmp_path):
    """A module for FlashAttention 4, and a folder for the user's tables."""
    (module,) = flash.install(monkeypatch, FOUR, card=9)
    monkeypatch.setattr(cache_dir, "user_cache", lambda: tmp_path)
    yield module
    lookup.clear_cache()


@pytest.mark.slow
def test_calls_of_a_library_are_held_to_float64(stand_in, monkeypatch):
    few = ("causal, fewer keys", "a factor a key", "sinks", "head dim 192, values of 128")
    monkeypatch.setattr(flash_checks, "DENSE", {name: flash_checks.DENSE[name] for name in few})
    names = [*few, *flash_checks.PACKED, "lse"]
    (library,) = libraries.libraries.__wrapped__(9)
    assert {row[2] for row in flash_checks.check(library, CPU, -1.0)} == {"not run: out of time"}
    assert flash_checks.check(library, CPU) == [["flash-attn-4", name, "right"] for name in names]
    attend = stand_in.flash_attn_func

    @wraps(attend)
    def halved(q, *others, **options):
        return attend(q * 0.5, *others, **options)

    found = flash_checks.check(replace(library, dense=halved), CPU)
    assert [row[2].startswith("WRONG: AssertionError: out: expected an error of") for row in found[:4]] == [True] * 4
    assert flash_checks.wrong(found) == ["flash-attn-4"]
    flash.install(monkeypatch, "flash-attn-2 2.8.3.post2")
    (library,) = libraries.libraries.__wrapped__(8)
    assert ["flash-attn-2", "sinks", "refused: sinks"] in flash_checks.check(library, CPU)


@pytest.mark.parametrize(
    ("ratios", "outcome", "chosen"),
    [({64: 1.2, 128: 1.1}, "right", "flash-attn-4"), ({64: 1.2, 128: 1.0}, "right", ""), ({64: 2.0}, "WRONG: x", "")],
)
def test_a_table_names_a_library_that_is_right_and_faster(ratios, outcome, chosen, stand_in, monkeypatch, capsys):
    monkeypatch.setattr(command, "libraries", libraries.libraries.__wrapped__)
    monkeypatch.setattr(command, "card_of", lambda device: 9)
    monkeypatch.setattr(command, "gains", lambda *arguments: ratios)
    monkeypatch.setattr(flash_checks, "_outcome", lambda call, end: outcome)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: H100.name)
    monkeypatch.setattr(Target, "of", classmethod(lambda cls, device: H100))
    try:
        command.compare(CPU, 60.0, True)
    except SystemExit as stop:
        assert stop.code == "flash: wrong results of flash-attn-4"  # noqa: PT017
        assert outcome != "right"
    else:
        assert outcome == "right"
    assert lookup.faster_library(H100) == chosen
    assert f'"auto" takes {chosen or "the kernels"}' in capsys.readouterr().out


def test_a_table_of_this_card_alone_names_a_library(stand_in):
    assert (lookup.faster_library(H100), lookup.faster_library(H200)) == ("", "")
    path = command.write("flash-attn-4", H100)
    assert path.endswith("h100.json")
    assert (lookup.faster_library(H100), lookup.faster_library(H200)) == ("flash-attn-4", "")
    command.write("", H100)
    assert lookup.faster_library(H100) == ""


@pytest.mark.parametrize(("named", "runs"), [("flash-attn-4", True), ("flash-attn-3", False), ("", False)])
def test_auto_takes_the_library_that_the_table_names(named, runs, stand_in, monkeypatch):
    q, k, v = (x.bfloat16() for x in torch.randn(3, 1, 2, 8, 16))
    chosen = []
    monkeypatch.setattr(choice, "_AUTO", {"cpu": ("flash", "triton", "sdpa")})
    monkeypatch.setattr("tritonattn.backends.flash._faster_library", lambda device: named)
    monkeypatch.setattr(dispatch.ops, "attention", lambda call: chosen.append(call.backend) or Stopped.now())
    for options, may in (({}, True), ({"return_aux": True}, False), ({"dropout_p": 0.5}, False)):
        try:
            tritonattn.attention(q, k, v, causal=True, **options)
        except Stopped:
            pass
        assert (len(stand_in.calls), chosen) == ((1, []) if runs and may else (0, ["triton"])), options
        stand_in.calls.clear()
        chosen.clear()


class Stopped(Exception):
    @classmethod
    def now(cls):
        raise cls
