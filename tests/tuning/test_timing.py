"""Turns of contestants, and what is noted of a card beside its times."""

from __future__ import annotations

import subprocess
from types import SimpleNamespace

import torch

from tritonattn.tuning import timing
from tritonattn.tuning.timing import card_state, take_turns

CUDA = torch.device("cuda", 1)


class Clock:
    """Of a GPU that only notes: what is done takes a millisecond, and events know what lies between them."""

    def __init__(self):
        self.done = []

    def doing(self, what):
        return lambda *numbers: self.done.append((what, *numbers))

    def event(self, enable_timing):
        return Event(self)


class Event:
    def __init__(self, clock):
        self.clock = clock

    def record(self):
        self.place = len(self.clock.done)

    def synchronize(self):
        assert hasattr(self, "place")

    def elapsed_time(self, end):
        return float(end.place - self.place)


def test_contestants_take_turns_on_the_next_inputs_and_an_overwritten_cache(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(torch.cuda, "Event", clock.event)
    monkeypatch.setattr(timing.torch, "empty", lambda *size, **options: SimpleNamespace(zero_=clock.doing("flush")))
    taken = take_turns({"a": clock.doing("a"), "b": clock.doing("b")}, CUDA, rounds=3, warm_up=0.0)
    assert taken == {"a": [1.0] * 3, "b": [1.0] * 3}  # the call alone, without the flush
    turns = [(name, number) for number in range(3) for name in "ab"]
    assert clock.done == [("a", 0), ("b", 0), *(step for turn in turns for step in (("flush",), turn))]


def test_time_that_is_up_leaves_three_rounds():
    calls = []
    taken = take_turns({"a": calls.append}, torch.device("cpu"), rounds=9, warm_up=0.0, seconds=0.0)
    assert len(taken["a"]) == 3
    assert calls == [0, 0, 1, 2]


def test_medians_and_quartiles():
    found = timing.Timing.of([3.0, 1.0, 2.0, 4.0, 100.0])
    assert (found.median, found.lower, found.upper, found.rounds) == (3.0, 2.0, 4.0, 5)
    assert timing.Timing.of([2.0]) == timing.Timing(2.0, 2.0, 2.0, 1)


def test_the_card_that_is_asked_is_the_one_that_measured(monkeypatch):
    """By its UUID: where CUDA_VISIBLE_DEVICES hides cards, nvidia-smi counts others than torch."""
    asked = []

    def run(command, **options):
        asked.append(command[command.index("-i") + 1])
        return SimpleNamespace(stdout="570.1, 1980 MHz, 2619 MHz, 41, 512.30 W\n")

    monkeypatch.setattr(subprocess, "run", run)
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(uuid=f"ab-{device.index}"))
    state = card_state(CUDA)
    assert asked == ["GPU-ab-1"]
    assert state["driver_version"] == "570.1"
    assert state["temperature.gpu"] == "41"


def test_without_nvidia_smi_nothing_is_noted(monkeypatch):
    def missing(command, **options):
        raise FileNotFoundError(command[0])

    monkeypatch.setattr(subprocess, "run", missing)
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(uuid="ab"))
    assert card_state(CUDA) == card_state(torch.device("cpu")) == {}
