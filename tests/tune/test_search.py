"""What a card or a compiler does to a search; no kernel runs."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")
from tritonattn.tune import search
from tritonattn.tune.workload import Size
from tritonattn.tuning.config import Target, TileConfig
from tritonattn.tuning.gate import Candidate
from tritonattn.tuning.static import Compiler
from tritonattn.tuning.table import Key

KEY = Key("forward", 64, "none", "short")
BEST = TileConfig(16, 16, 4, 1)
SM_80, CPU = Target("cuda", "80"), torch.device("cpu")


class Workload:
    """Stands for one of a key, whose launch meets an illegal address."""

    def __init__(self, key, size, dtype, device):
        self.key, self.size, self.dtype, self.device = key, size, dtype, device

    def error(self):
        raise RuntimeError("CUDA error: an illegal memory access was encountered")


def run(configs=(BEST,)):
    return search.search(KEY, list(configs), SM_80, CPU, search.Effort(warm_up=0), Size(1, 1, 16))


def test_operands_that_the_memory_does_not_hold(monkeypatch):
    def build(*_):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 6.00 GiB")

    monkeypatch.setattr(search, "Workload", build)
    result = run()
    assert result.entry is None
    assert "forward/64/none/short: OutOfMemoryError: CUDA out of memory" in result.wrong[0]


def test_a_config_that_takes_the_card_with_it_ends_the_search(monkeypatch):
    """No later result of the process means anything: neither that a config is wrong, nor that one is fast."""
    monkeypatch.setattr(search, "Workload", Workload)
    assert len(run().wrong) == 2, "a failure that the card outlives is the config's alone"
    monkeypatch.setattr(search, "_is_lost", lambda device: True)
    with pytest.raises(search.SearchError, match=r"forward/64/none/short .*unusable.*illegal memory access"):
        run()


def test_a_card_that_is_lost_while_it_is_timed(monkeypatch):
    def fail(*_):
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(Workload, "error", lambda self: None)
    monkeypatch.setattr(search, "Workload", Workload)
    monkeypatch.setattr(search, "take_turns", fail)
    with pytest.raises(RuntimeError, match="illegal memory access"):
        run()
    monkeypatch.setattr(search, "_is_lost", lambda device: True)
    with pytest.raises(search.SearchError, match=r"forward/64/none/short, while timed, left the card unusable"):
        run()


def test_a_lost_card(monkeypatch):
    def synchronize(device):
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    assert not search._is_lost(CPU)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)
    assert not search._is_lost(torch.device("cuda"))
    monkeypatch.setattr(torch.cuda, "synchronize", synchronize)
    assert search._is_lost(torch.device("cuda"))


def test_a_machine_that_compiles_nothing_is_not_searched_on(monkeypatch):
    """It would time the config in use alone, and call it the fastest."""

    def examine(self, wanted):
        return [Candidate(config, None, ("does not compile: no nvdisasm",)) for _, _, config in wanted]

    monkeypatch.setattr(Compiler, "examine", examine)
    with Compiler(SM_80, 1) as compiler, pytest.raises(search.SearchError, match=r"no config compiles; .*no nvdisasm"):
        search.promising(KEY, compiler, 6)
