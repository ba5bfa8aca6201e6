"""The configs that a static table ranks, and their order; nothing is compiled."""

import pytest

pytest.importorskip("triton")
from tritonattn.tuner import static
from tritonattn.tuner.candidates import static_candidates
from tritonattn.tuner.gate import Candidate
from tritonattn.tuner.machine_code import MachineCode
from tritonattn.tuner.static import ranked, static_table
from tritonattn.tuning.defaults import default_config
from tritonattn.tuning.gpus import GPUS
from tritonattn.tuning.table import Key

A100 = next(gpu for gpu in GPUS if gpu.name == "a100")
SM_80 = A100.target
KEY = Key("forward", 64, "query", "long")
DEFAULT = default_config(KEY.kernel, KEY.problem, SM_80)
OTHER, THIRD, *_ = (config for config in static_candidates(KEY.kernel, KEY.problem, SM_80) if config != DEFAULT)


class Stub:
    """A compiler whose configs pass but for those that `fails` names, with a problem or for all."""

    def __init__(self, *fails):
        self.fails, self.asked = fails, []

    def examine(self, wanted, progress=None):
        self.asked += wanted
        code = MachineCode(128, 0, 0, 0)
        return [Candidate(config, code, self.reasons(problem, config)) for _, problem, config in wanted]

    def reasons(self, problem, config):
        return ("spills",) if config in self.fails or (problem, config) in self.fails else ()


@pytest.fixture
def clocks(monkeypatch):
    """The model's clocks: 100, but for the configs to which a test gives others."""
    clocks = {}

    def modelled(kernel, problem, one, *_):
        return clocks.get((one.config, problem.short), clocks.get(one.config, 100.0))

    monkeypatch.setattr(static, "modelled_clocks", modelled)
    return clocks


@pytest.mark.parametrize(("ahead", "first"), [(97.0, DEFAULT), (93.0, OTHER)])
def test_the_default_keeps_its_place_unless_another_is_clearly_ahead(ahead, first, clocks):
    clocks[OTHER] = ahead
    assert ranked(A100, Stub(), KEY)[0] == first
    assert ranked(A100, Stub(DEFAULT), KEY)[0] == OTHER, "it does not pass"


@pytest.mark.parametrize(("ahead", "first"), [(77.0, OTHER), (75.0, THIRD)])
def test_long_calls_take_the_config_of_short_ones_unless_another_is_clearly_ahead(ahead, first, clocks):
    clocks |= {OTHER: 80.0, (THIRD, False): ahead}
    assert ranked(A100, Stub(), KEY)[0] == first
    assert ranked(A100, Stub(), KEY._replace(lengths="short"))[0] == OTHER


def test_an_entry_passes_for_its_own_call(clocks):
    """Though the ranking is by another."""
    clocks[OTHER] = 10.0
    key = KEY._replace(scales="query+key")
    assert static_table(A100, Stub(), [key]).entries[key].config == OTHER
    assert static_table(A100, Stub((key.problem, OTHER)), [key]).entries[key].config == DEFAULT
    every = static_candidates(key.kernel, key.problem, SM_80)
    assert static_table(A100, Stub(*((key.problem, config) for config in every)), [key]).entries == {}
