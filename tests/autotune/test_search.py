"""Searches on cards and with compilers that fail; no kernel runs."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("triton")
from tritonattn.autotune import search
from tritonattn.autotune.candidates import candidates
from tritonattn.autotune.gate import Candidate, Code, Compiler
from tritonattn.backends.triton import launch
from tritonattn.tuning import cache_dir, lookup
from tritonattn.tuning.calls import Size
from tritonattn.tuning.config import SHARES, Target, TileConfig
from tritonattn.tuning.defaults import default_config
from tritonattn.tuning.lookup import config_for
from tritonattn.tuning.table import Exact, Key

KEY = Key("forward", 64, "none", "short")
SM_80, CPU = Target("cuda", "80"), torch.device("cpu")


OTHERS = [TileConfig(16, 16, 4, stages) for stages in (1, 2, 3, 4)]
IN_USE = config_for(KEY.kernel, KEY.problem, SM_80)
HALF, BRAIN = torch.float16, torch.bfloat16


@pytest.fixture
def timed(monkeypatch):
    """Results that are right but for those of (dtype, config) in `wrong`; calls as they are made.

    A config takes the milliseconds of its tiles, times the factors of its l2_percent and split_blocks.
    """
    timed = SimpleNamespace(wrong=set(), factors={}, calls=[], rounds=[])
    milliseconds = dict(zip([IN_USE, *OTHERS], (8, 4, 2, 16, 32), strict=True))

    class Workload:
        def __init__(self, kernel, problem, size, device):
            self.kernel, self.problem, self.size = kernel, problem, size

        def config(self):
            return launch.config_for(self.kernel, KEY.problem, SM_80)

        def error(self):
            return "is wrong" if (self.problem.dtype, self.config()) in timed.wrong else None

        def __call__(self, number):
            timed.calls.append((self.problem.dtype, self.config(), number))

    def take_turns(contestants, device, rounds, *_):
        taken = {}
        timed.rounds.append((rounds, len(contestants)))
        for name, contestant in contestants.items():
            contestant(7)
            config = timed.calls[-1][1]
            factor = timed.factors.get(config.l2_percent, 1) * timed.factors.get(-config.split_blocks, 1)
            taken[name] = [milliseconds.get(replace(config, **SHARES), 8) * factor * x for x in (1, 0.5, 2)]
        return taken

    monkeypatch.setattr(search, "Workload", Workload)
    monkeypatch.setattr(search, "take_turns", take_turns)
    return timed


def find(key=KEY):
    return search.search(key, OTHERS, SM_80, CPU, search.Effort(), Size(2, 4, 16, 16), (BRAIN, HALF))


def test_the_fastest_is_taken_and_the_next_are_noted(timed):
    result = find()
    assert (result.before, result.entry.config, result.gain) == (IN_USE, OTHERS[1], 4.0)
    assert timed.calls[:10] == [(dtype, config, 7) for config in (IN_USE, *OTHERS) for dtype in (BRAIN, HALF)]
    assert timed.rounds == [(5, 5), (20, 5), (20, 6)], "all of them, the fastest, and the best one's orders"
    details = result.entry.details
    assert (details["milliseconds"], details["quartiles"]) == (2, [1.5, 3])
    assert details["size"] == {"batch": 2, "heads": 4, "q_len": 16, "k_len": 16, "group": 1}
    assert (details["dtypes"], details["rounds"]) == (["bfloat16", "float16"], 3)
    next_ones = [(one["num_stages"], one["milliseconds"]) for one in details["runners_up"]]
    assert next_ones == [(1, 4), (IN_USE.num_stages, 8), (3, 16)]


def test_the_fastest_of_a_few_rounds_go_on_with_the_one_in_use(timed):
    effort = search.Effort(first_rounds=3, timed=2, rounds=9)
    result = search.search(KEY, OTHERS, SM_80, CPU, effort, Size(2, 4, 16, 16))
    assert (result.entry.config, result.gain) == (OTHERS[1], 4.0)
    assert timed.rounds == [(3, 5), (9, 3), (9, 6)]
    assert [config for _, config, _ in timed.calls[5:8]] == [IN_USE, OTHERS[1], OTHERS[0]]


def test_the_best_tiles_are_timed_in_other_orders(timed):
    timed.factors = {25: 1.5, 200: 0.9, 400: 0.95}
    result = find()
    assert result.entry.config == replace(OTHERS[1], l2_percent=200)
    assert (result.entry.details["milliseconds"], result.before_timing.median) == (1.8, 8)
    last = [config for dtype, config, _ in timed.calls if dtype == BRAIN][-6:]
    assert last == [IN_USE, *(replace(OTHERS[1], l2_percent=percent) for percent in (100, 25, 50, 200, 400))]
    timed.wrong = {(HALF, replace(OTHERS[1], l2_percent=200))}
    assert find().entry.config.l2_percent == 400
    timed.factors = {25: 0.98}
    assert find().entry.config.l2_percent == 100, "not clearly ahead"


def test_splits_are_timed_for_recorded_decoding(timed):
    timed.factors = {-16: 0.5}
    assert find(Key("decode", 64, "none", "short")).entry.config.split_blocks == 4
    recorded = find(Exact("decode", KEY.problem))
    assert (recorded.entry.config, recorded.gain) == (replace(OTHERS[1], split_blocks=16), 8)
    timed.factors = {}
    assert find(Exact("decode", KEY.problem)).entry.config.split_blocks == 4


def test_a_result_that_is_wrong_in_one_dtype_is_not_taken(timed):
    timed.wrong = {(HALF, OTHERS[1])}
    result = find()
    assert result.entry.config == OTHERS[0]
    assert result.wrong == (f"{KEY} {OTHERS[1]}: is wrong",)


def test_a_quick_search_starts_from_the_table(monkeypatch):
    """From its entry, which is timed first, to what differs from it in one field: the default is no neighbour here."""
    key, target = Key("forward", 128, "query", "long"), Target.parse("sm_90")

    def examine(self, wanted):
        return [Candidate(config, Code(128, 0, 0), ()) for _, _, config in wanted]

    monkeypatch.setattr(Compiler, "examine", examine)
    table = lookup.usable_table(cache_dir.shipped_tables() / "h100.json", target)
    entry = table.entries[key].config
    with Compiler(target, 1) as compiler:
        first, *others = search.passing(key, compiler, search.QUICK)
    assert first == entry == lookup.config_for(key.kernel, key.problem, target)
    assert {replace(entry, num_stages=2), replace(entry, descriptors=False)} <= set(others)
    assert default_config(key.kernel, key.problem, target) not in others
    assert len([one for one in others if one.kernel == "triton"]) < 12


def test_all_that_pass_the_gate_are_timed_and_nothing_where_nothing_compiles(monkeypatch):
    """Else the config in use would be timed alone, and called the fastest."""
    code, asked = Code(128, 0, 0), (KEY.kernel, KEY.problem, SM_80)

    def examine(self, wanted):
        return [
            Candidate(config, code, ("spills",) if config.num_warps == 8 or code is None else ())
            for _, _, config in wanted
        ]

    monkeypatch.setattr(Compiler, "examine", examine)
    with Compiler(SM_80, 1) as compiler:
        found = search.passing(KEY, compiler, search.Effort())
        assert found == [one for one in candidates(*asked) if one.num_warps != 8]
        assert len(found) > search.Effort().timed
        code = None
        with pytest.raises(search.SearchError, match=r"no config compiles; .*spills"):
            search.passing(KEY, compiler, search.Effort())
