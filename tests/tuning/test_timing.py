"""What is noted of a card beside its times."""

from __future__ import annotations

import subprocess
from types import SimpleNamespace

import torch

from tritonattn.tuning.timing import card_state

CUDA = torch.device("cuda", 1)


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
