"""The configs that a static table ranks, and their order; nothing is compiled."""

from dataclasses import replace

import pytest

from perf.models.static import ranking
from perf.models.static.gate import Judged, Latency
from perf.models.static.machine_code import MachineCode
from perf.models.static.ranking import ranked, ranked_table, static_candidates
from tritonattn.tuning.defaults import default_config
from tritonattn.tuning.gpus import GPUS
from tritonattn.tuning.table import Key

A100 = next(gpu for gpu in GPUS if gpu.name == "a100")
SM_80 = A100.target
KEY = Key("forward", 64, "query", "long")
DEFAULT = default_config(KEY.kernel, KEY.problem, SM_80)
_SHORT = [one for one in static_candidates(KEY.kernel, KEY.problem, SM_80) if one.num_stages == 2 and one != DEFAULT]
OTHER, THIRD, *_ = _SHORT


class Stub:
    """A compiler whose configs pass but for those that `fails` names, with a problem or for all."""

    def __init__(self, *fails):
        self.fails, self.asked = fails, []

    def examine(self, wanted, progress=None):
        self.asked += wanted
        code = MachineCode(128, 0, 0, 0)
        return [Judged(config, code, self.reasons(problem, config)) for _, problem, config in wanted]

    def reasons(self, problem, config):
        return ("spills",) if config in self.fails or (problem, config) in self.fails else ()


@pytest.fixture
def clocks(monkeypatch):
    """The model's clocks: 100, but for the configs to which a test gives others."""
    clocks = {}

    def modelled(kernel, problem, one, *_):
        return clocks.get((one.config, problem.short), clocks.get(one.config, 100.0))

    monkeypatch.setattr(ranking, "modelled_clocks", modelled)
    return clocks


@pytest.mark.parametrize(("ahead", "first"), [(97.0, DEFAULT), (93.0, OTHER)])
def test_the_default_comes_first_unless_another_is_clearly_ahead(ahead, first, clocks):
    clocks[OTHER] = ahead
    assert ranked(A100, Stub(), KEY)[0] == first
    assert ranked(A100, Stub(DEFAULT), KEY)[0] == OTHER, "it does not pass"


@pytest.mark.parametrize(("ahead", "first"), [(77.0, OTHER), (75.0, THIRD)])
def test_long_calls_take_the_config_of_short_ones_unless_another_is_clearly_ahead(ahead, first, clocks):
    clocks |= {OTHER: 80.0, (THIRD, False): ahead}
    assert ranked(A100, Stub(), KEY)[0] == first
    assert ranked(A100, Stub(), KEY._replace(lengths="short"))[0] == OTHER


@pytest.mark.parametrize(
    ("late", "programs", "first"), [((True, False), 2, 3), ((True, True), 2, 2), ((True, False), 1, 2)]
)
def test_loads_asked_for_late_are_refused_where_another_stage_fits(late, programs, first, clocks):
    """It asks in time, and leaves as many programs; though the model prefers fewer stages."""
    clocks |= {DEFAULT: 1000.0, OTHER: 10.0}
    longer = replace(OTHER, num_stages=OTHER.num_stages + 1)

    class Replayed(Stub):
        def examine(self, wanted, progress=None):
            found = super().examine(wanted, progress)
            of = {OTHER: Latency(0.5, 1.0, 2, late[0]), longer: Latency(0.5, 1.0, programs, late[1])}
            return [replace(one, latency=of.get(one.config)) for one in found]

    assert OTHER.num_stages == 2
    clocks[longer] = 20.0
    assert ranked(A100, Replayed(), KEY)[0] == replace(OTHER, num_stages=first)


def test_an_entry_fits_with_every_option(clocks):
    """With all vectors and statistics that a call of its key may have."""

    class Large(Stub):
        def examine(self, wanted, progress=None):
            found = super().examine(wanted, progress)
            for number, (_, problem, config) in enumerate(wanted):
                if problem.aux and config == OTHER:
                    found[number] = replace(found[number], code=MachineCode(128, 0, 200000, 0))
            return found

    clocks[OTHER] = 10.0
    assert ranked_table(A100, Large(), [KEY]).entries[KEY].config == DEFAULT


def test_an_entry_passes_for_its_call(clocks):
    """Though the ranking is by another."""
    clocks[OTHER] = 10.0
    key = KEY._replace(scales="query+key")
    assert ranked_table(A100, Stub(), [key]).entries[key].config == OTHER
    assert ranked_table(A100, Stub((key.problem, OTHER)), [key]).entries[key].config == DEFAULT
    every = static_candidates(key.kernel, key.problem, SM_80)
    assert ranked_table(A100, Stub(*((key.problem, config) for config in every)), [key]).entries == {}
