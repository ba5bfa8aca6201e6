"""`tritonattn tune` on a GPU that a stub stands for: what is searched for, kept, printed, and stopped."""

import os

import pytest

pytest.importorskip("triton")
from tritonattn.tuner import tune as commands
from tritonattn.tuner.search import SearchError
from tritonattn.tuning import lookup
from tritonattn.tuning.table import Entry, read_table

from .stubs import BEST, H100, KEYS, SEARCH, run


@pytest.fixture
def instead(monkeypatch):
    """instead(error): the search for the second key raises it; returns the search as it was."""
    search = commands.search

    def put(error):
        def changed(key, *arguments, **options):
            if key == KEYS[1]:
                raise error
            return search(key, *arguments, **options)

        monkeypatch.setattr(commands, "search", changed)
        return search

    return put


def test_a_search_writes_what_it_found_and_shows_the_gain(on_h100, user, capsys):
    assert lookup.find("forward", KEYS[0].problem, H100).path is None
    status, out, _ = run(capsys, *SEARCH)
    assert status == 0
    assert read_table(user / "h100.json").entries == dict.fromkeys(KEYS, Entry(BEST, "measured", {"milliseconds": 1.0}))
    assert "2.000x" in out
    assert lookup.find("forward", KEYS[0].problem, H100) == (BEST, user / "h100.json", KEYS[0])


def test_a_search_that_is_stopped_goes_on(on_h100, user, instead, monkeypatch, capsys):
    search = instead(KeyboardInterrupt())
    status, out, _ = run(capsys, *SEARCH)
    assert status == 130
    assert "stopped: run the command again to go on" in out
    assert set(read_table(user / "h100.json").entries) == {KEYS[0]}
    monkeypatch.setattr(commands, "search", search)
    _, out, _ = run(capsys, *SEARCH)
    assert "1 of 3 keys are measured already" in out
    assert on_h100 == KEYS


def test_a_card_that_is_lost_is_said(on_h100, user, instead, capsys):
    instead(SearchError(f"{KEYS[1]} left the card unusable to this process"))
    status, _, err = run(capsys, *SEARCH)
    assert status == 2
    assert f"{KEYS[1]} left the card unusable to this process. 1 keys were searched before" in err
    assert set(read_table(user / "h100.json").entries) == {KEYS[0]}


def test_nothing_is_timed_whose_result_could_not_be_written(on_h100, user, monkeypatch, capsys):
    monkeypatch.setattr(os, "access", lambda path, mode: not mode & os.W_OK)
    status, _, err = run(capsys, *SEARCH)
    assert status == 2
    assert f"cannot write {user / 'h100.json'}: Permission denied" in err
    assert on_h100 == []


def test_a_budget_is_of_minutes(on_h100, monkeypatch, capsys):
    monkeypatch.setattr(commands.time, "monotonic", lambda: 1000.0 + 40 * len(on_h100))
    _, out, _ = run(capsys, *SEARCH, "--budget", "1")
    assert "the budget of 1 minutes is spent" in out
    assert on_h100 == KEYS[:2]
