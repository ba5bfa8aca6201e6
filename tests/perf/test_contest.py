"""Contestants that are left out: wrong at the second call or in another head, or with errors midway."""

import math
from dataclasses import replace

import pytest
import torch

from perf.cases import contest
from perf.cases.attention import Case
from perf.cases.check import judge
from perf.cases.contest import Contest, Effort, Entrant, Verdict
from perf.cases.decode import DecodeCase
from perf.cases.records import Record
from perf.cases.varlen import VarlenCase
from perf.cases.work import Shape
from perf.sweep.report import tables

from .commands import CPU, HERE

TWICE = Effort(2, 1.0, 0.0)


def run(*entrants: Entrant) -> dict[str, Record]:
    case = Contest("forward", {"length": 1}, lambda: list(entrants), "ours", CPU)
    return {record.contestant: record for record in case.run(TWICE, HERE)}


def entrant(name, error=0.1, call=lambda number: {}):
    verdict = Verdict(error, 1.0, "" if error <= 1 else "out: expected")
    return Entrant(name, "dim", lambda: call, lambda results: verdict, ours=name == "ours")


def test_times_rates_and_ratios_are_those_of_one_call(monkeypatch):
    """Calls that are timed together; a ratio is the median of the rounds'."""
    calls = []

    def take_turns(contestants, *_):
        contestants["peer"](5)
        return {"ours": [1.0, 2.0, 4.0], "peer": [3.0, 4.0, 4.0]}

    monkeypatch.setattr(contest, "take_turns", take_turns)
    entrants = [entrant("ours"), entrant("peer", call=lambda number: calls.append(number) or {})]
    case = Contest("forward", {}, lambda: entrants, "ours", CPU, flops=6 * 10**9, bytes=8 * 10**6, calls=2)
    ours, peer = case.run(TWICE, HERE)
    assert calls == [0, 0, 5, 5], "the trial's two, and those of a round"
    assert (peer.median_ms, peer.lower_ms, peer.upper_ms, peer.rounds) == (2.0, 1.75, 2.0, 3)
    assert (peer.tflops, peer.gbps, peer.ratio, peer.baseline) == (3.0, 4.0, 2.0, "ours")
    assert (ours.median_ms, ours.ratio) == (1.0, 1.0)


@pytest.mark.parametrize(
    ("error", "ours", "peers"),
    [
        (0.9, "measured", "measured"),
        (1.7, "wrong", "inexact"),
        (4.0, "wrong", "inexact"),
        (4.1, "wrong", "wrong"),
        (math.nan, "wrong", "wrong"),
    ],
)
def test_an_error_of_a_peer_is_no_other_work(error, ours, peers):
    """Named, not timed, but no failure of the run: as that of FlexAttention in fp32 on a CPU."""
    found = run(entrant("ours", error), entrant("peer", error))
    assert (found["ours"].status, found["peer"].status) == (ours, peers)
    assert [record.is_bad for record in found.values()] == [ours == "wrong", peers == "wrong"]
    assert all((record.median_ms is None) == (record.status != "measured") for record in found.values())
    verdicts = iter([Verdict(0.1, 1.0), Verdict(error, 1.0, "" if error <= 1 else "out: expected")])
    second = run(Entrant("ours", "dim", lambda: lambda number: {}, lambda results: next(verdicts), ours=True))
    assert second["ours"].status == ours, "the second call is checked too"
    if peers != "measured":
        line = f"- peer, length=1: {peers}, so not timed: out: expected"
        assert line in tables(found.values()).splitlines()


def test_the_worst_of_all_results_counts_and_their_shapes():
    exact = {name: torch.ones(2, 3, dtype=torch.float64) for name in ("out", "gradient of q")}
    eager = {name: x.float() for name, x in exact.items()}
    worse = judge({"out": 1.001 * exact["out"], "gradient of q": 1.1 * exact["out"]}, exact, eager, torch.float32)
    assert worse.reason.startswith("gradient of q: expected an error")
    rough = eager | {"out": 1.1 * eager["out"]}  # whose bound a larger error keeps
    worst = judge({"out": 1.1 * exact["out"], "gradient of q": 1.001 * exact["out"]}, exact, rough, torch.float32)
    assert worst.reason.startswith("gradient of q: expected an error")
    broadcast = judge({"out": torch.ones(2, 1)}, exact, eager, torch.float32)
    assert broadcast.reason == "out: expected shape (2, 3), got (2, 1)"


def spoil(attend, *position):
    """Its result with one head, or one head of one sequence, wrong by one percent."""

    def wrong(*args, **options):
        out = attend(*args, **options).clone()
        out[position] *= 1.01
        return out

    return wrong


def statuses(case):
    return {record.contestant: record.status for record in case.contest().run(TWICE, HERE)}


WHO = (("tritonattn", "dim"), ("sdpa", "dim"))
BATCH = Case("forward", Shape(2, 2, 2, 9, 9, 8, causal=True), "fp32", "backward", WHO, CPU, "sdpa")
PACKED = VarlenCase((3, 9), 2, 8, "fp32", "forward+backward", "key_norm_mean", ("sdpa",), CPU, "sdpa")
DECODING, PAGED = (
    DecodeCase(Shape(2, 4, 2, 1, 16, 8, causal=False), "fp32", paged, "dim", (), CPU, "sdpa") for paged in (False, True)
)


@pytest.mark.parametrize(
    ("case", "position"),
    [
        (BATCH, (-1, -1)),
        (replace(BATCH, passes="forward+backward"), (-1, -1)),
        (PACKED, (slice(3), 0)),
        (PACKED, (slice(3, None), -1)),
        (DECODING, (0, 0)),
        (PAGED, (-1, -1)),
    ],
)
def test_the_first_and_the_last_head_and_sequence_are_checked(case, position, monkeypatch):
    right = type(case)._ours
    monkeypatch.setattr(type(case), "_ours", lambda self, *options: spoil(right(self, *options), *position))
    found = statuses(case)
    assert found.pop(f"tritonattn {'key_norm_mean' if case is PACKED else 'dim'}") == "wrong"
    assert set(found.values()) == {"measured"}
