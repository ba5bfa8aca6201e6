"""Searches on cards and with compilers that fail; no kernel runs."""

from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("triton")
from tritonattn.backends.triton import launch
from tritonattn.tuner import search
from tritonattn.tuner.gate import Candidate
from tritonattn.tuner.machine_code import MachineCode
from tritonattn.tuner.static import Compiler
from tritonattn.tuning.calls import Size
from tritonattn.tuning.config import Target, TileConfig
from tritonattn.tuning.lookup import config_for
from tritonattn.tuning.table import Key

KEY = Key("forward", 64, "none", "short")
BEST = TileConfig(16, 16, 4, 1)
SM_80, CPU = Target("cuda", "80"), torch.device("cpu")


class Workload:
    """Stands for one of a key, whose launch meets an illegal address."""

    def __init__(self, kernel, problem, size, device):
        self.kernel, self.problem, self.size, self.device = kernel, problem, size, device

    def error(self):
        raise RuntimeError("CUDA error: an illegal memory access was encountered")


OTHERS = [TileConfig(16, 16, 4, stages) for stages in (1, 2, 3, 4)]
IN_USE = config_for(KEY.kernel, KEY.problem, SM_80)
HALF, BRAIN = torch.float16, torch.bfloat16


@pytest.fixture
def timed(monkeypatch):
    """Results that are right but for those of (dtype, config) in `wrong`, times by config; calls as they are made."""
    timed = SimpleNamespace(
        wrong=set(), milliseconds=dict(zip([IN_USE, *OTHERS], (8, 4, 2, 16, 32), strict=True)), calls=[]
    )

    class Right(Workload):
        def config(self):
            return launch.config_for(KEY.kernel, KEY.problem, SM_80)

        def error(self):
            return "is wrong" if (self.problem.dtype, self.config()) in timed.wrong else None

        def __call__(self, number):
            timed.calls.append((self.problem.dtype, self.config(), number))

    def take_turns(contestants, *_):
        for contestant in contestants.values():
            contestant(7)
        seen = list(dict.fromkeys(config for _, config, _ in timed.calls))
        return {
            name: [timed.milliseconds[config] * x for x in (1, 0.5, 2)]
            for name, config in zip(contestants, seen, strict=True)
        }

    monkeypatch.setattr(search, "Workload", Right)
    monkeypatch.setattr(search, "take_turns", take_turns)
    return timed


def find():
    return search.search(KEY, OTHERS, SM_80, CPU, search.Effort(), Size(2, 4, 16, 16), (BRAIN, HALF))


def test_the_fastest_is_taken_and_the_next_are_noted(timed):
    result = find()
    assert (result.before, result.entry.config, result.gain) == (IN_USE, OTHERS[1], 4.0)
    assert timed.calls == [(dtype, config, 7) for config in (IN_USE, *OTHERS) for dtype in (BRAIN, HALF)]
    details = result.entry.details
    assert (details["milliseconds"], details["quartiles"]) == (2, [1.5, 3])
    assert details["size"] == {"batch": 2, "heads": 4, "q_len": 16, "k_len": 16, "group": 1}
    assert (details["dtypes"], details["rounds"]) == (["bfloat16", "float16"], 3)
    next_ones = [(one["num_stages"], one["milliseconds"]) for one in details["runners_up"]]
    assert next_ones == [(1, 4), (IN_USE.num_stages, 8), (3, 16)]


def test_a_result_that_is_wrong_in_one_dtype_is_not_taken(timed):
    timed.wrong = {(HALF, OTHERS[1])}
    result = find()
    assert result.entry.config == OTHERS[0]
    assert result.wrong == (f"{KEY} {OTHERS[1]}: is wrong",)


def test_the_promising_are_few_and_in_the_order_of_the_model(monkeypatch):
    """The model is asked about the card's processors."""
    asked = set()

    def examine(self, wanted):
        code = MachineCode(128, 0, 0, 0)
        return [Candidate(config, code, ("spills",) if config.num_warps == 8 else ()) for _, _, config in wanted]

    def clocks(kernel, problem, candidate, target, processors):
        asked.add((kernel, problem, processors))
        return candidate.config.num_stages + 8 / candidate.config.block_n

    monkeypatch.setattr(Compiler, "examine", examine)
    monkeypatch.setattr(search, "modelled_clocks", clocks)
    with Compiler(SM_80, 1) as compiler:
        found = search.promising(KEY, compiler, search.Effort(timed=3))
    assert [(one.num_stages, one.block_n, one.num_warps) for one in found] == [(2, 128, 4), (2, 128, 4), (2, 64, 4)]
    assert asked == {(KEY.kernel, KEY.problem, 108)}
