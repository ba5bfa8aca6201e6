"""How many threads a command takes."""

import pytest
import torch

from tritonattn.cli import threads

CORES = ("cpu0", "cpu1", "cpu2", "cpu3")


@pytest.fixture
def given(monkeypatch):
    """The numbers of threads that torch was given, with four cores and four threads before."""
    found = []
    monkeypatch.setattr(threads, "usable_cores", lambda: len(CORES))
    monkeypatch.setattr(torch, "get_num_threads", lambda: len(CORES))
    monkeypatch.setattr(torch, "set_num_threads", found.append)
    monkeypatch.setattr(threads.time, "sleep", lambda seconds: None)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    return found


def watch(monkeypatch, *idle: float):
    """Let each core be idle for that share of the time that it is watched."""
    seconds = [dict.fromkeys(CORES, 7.0), {core: 7.0 + x * 0.2 for core, x in zip(CORES, idle, strict=True)}]
    monkeypatch.setattr(threads, "_idle_seconds", iter(seconds).__next__)


@pytest.mark.parametrize(
    ("idle", "wanted"), [((1, 1, 1, 1), 4), ((1, 0.9, 0.4, 0), 2), ((0, 0, 0, 0), 1), ((0, 0, 0, 1), 1)]
)
def test_as_many_threads_as_idle_cores(idle, wanted, given, monkeypatch):
    watch(monkeypatch, *idle)
    threads.limit_threads()
    assert given == [wanted]
