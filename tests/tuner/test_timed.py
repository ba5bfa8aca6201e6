"""`tritonattn tune` on a GPU that a stub stands for: what is searched for, kept, printed, and stopped."""

import pytest
import torch

triton = pytest.importorskip("triton")
from tritonattn.tuner import tune as commands
from tritonattn.tuner.search import SearchError
from tritonattn.tuning import lookup
from tritonattn.tuning.calls import Call, Calls, Size
from tritonattn.tuning.config import Problem
from tritonattn.tuning.table import Exact, read_table

from .stubs import BEST, H100, KEYS, MEASURED, SEARCH, run


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
    assert read_table(user / "h100.json").entries == dict.fromkeys(KEYS, MEASURED)
    assert "2.000x" in out
    assert lookup.find("forward", KEYS[0].problem, H100)[:3] == (BEST, user / "h100.json", KEYS[0])


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


def test_a_budget_is_of_minutes(on_h100, monkeypatch, capsys):
    monkeypatch.setattr(commands.time, "monotonic", lambda: 1000.0 + 40 * len(on_h100))
    _, out, _ = run(capsys, *SEARCH, "--budget", "1")
    assert "the budget of 1 minutes is spent" in out
    assert on_h100 == KEYS[:2]


def put_calls(path) -> list[Exact]:
    """The calls of a file, the busiest first: a training step of grouped heads, and decoding from pages."""
    step = Problem(128, 128, torch.bfloat16, right=True, grouped=True, rounding=True)
    problems = {"grad_query": step, "forward": step, "decode": Problem(128, 128, torch.float16, block_table=True)}
    sizes = [Size(1, 32, 4096, 4096, group=4), Size(1, 32, 2048, 2048, group=4), Size(8, 8, 1, 4096, page=16)]
    found = [Call(Exact(*of), size) for of, size in zip(problems.items(), sizes, strict=True)]
    Calls(dict.fromkeys(found, 7)).write(path)
    return [call.of for call in found]


def test_the_calls_of_a_file_are_searched_for(on_h100, user, tmp_path, capsys):
    """Each with its own size, in its dtype; their entries serve them, beside those of keys."""
    run(capsys, *SEARCH)
    calls = put_calls(tmp_path / "calls.json")
    status, out, _ = run(capsys, "tune", "--calls", str(tmp_path / "calls.json"))
    assert status == 0
    assert on_h100 == KEYS + calls
    assert on_h100.sizes[-1] == Size(8, 8, 1, 4096, page=16)
    assert str(calls[0]) in out
    assert set(read_table(user / "h100.json").entries) == {*KEYS, *calls}
    assert lookup.find(*calls[0], H100).key == calls[0]
    _, out, _ = run(capsys, "tune", "--calls", str(tmp_path / "calls.json"))
    assert "3 of 3 keys are measured already" in out
    assert on_h100 == KEYS + calls


def test_a_quick_search_takes_less_and_leaves_more_to_a_later_one(on_h100, user, capsys):
    run(capsys, *SEARCH, "--quick")
    assert {effort.rounds for effort in on_h100.efforts} == {8}
    run(capsys, *SEARCH, "--quick")
    assert on_h100 == KEYS
    run(capsys, *SEARCH)
    assert on_h100 == KEYS * 2


def test_a_file_without_calls(on_h100, tmp_path, capsys):
    path = tmp_path / "calls.json"
    for content, message in {
        None: "No such file",
        "{": "calls.json: Expecting",
        '{"schema_version": 1, "calls": []}': "nothing was recorded",
    }.items():
        if content is not None:
            path.write_text(content, encoding="utf-8")
        status, _, err = run(capsys, "tune", "--calls", str(path))
        assert status == 2
        assert message in err
    put_calls(path)
    status, _, err = run(capsys, "tune", "--calls", str(path), "--lengths", "short", "--kernels", "forward")
    assert status == 2
    assert "expected launches of forward of short calls, got none" in err
    assert on_h100 == []
