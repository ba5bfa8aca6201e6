"""`tritonattn tune` on a GPU that a stub stands for: what is searched for, kept, printed, and stopped."""

from contextlib import contextmanager

import pytest
import torch

pytest.importorskip("triton")
from tritonattn.autotune import tune as commands
from tritonattn.core import records
from tritonattn.tuning import lookup
from tritonattn.tuning.calls import Call, Calls, Size
from tritonattn.tuning.config import Problem, Target
from tritonattn.tuning.table import Exact, Key, Table, kernels_fingerprint, read_table

from .stubs import BEST, H100, KEYS, MEASURED, ONE, SEARCH, run


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
    assert list(on_h100) == KEYS


@pytest.mark.parametrize("words", [SEARCH, ONE], ids=["timed", "static"])
def test_a_table_is_read_in_its_writers_turn(words, on_h100, user, monkeypatch, capsys):
    """So that an entry stays that another process writes while this one waits."""
    gpu = "h100" if words is SEARCH else "a100"
    path, decode = user / f"{gpu}.json", Key("decode", 64, "none", "long")
    target = H100 if words is SEARCH else Target("cuda", "80")
    held, other = records._held, Table(gpu, target, kernels_fingerprint(), {decode: MEASURED})

    @contextmanager
    def waited(file):
        with held(file):
            if not path.exists():
                path.write_text(other.text())
            yield

    monkeypatch.setattr(records, "_held", waited)
    assert run(capsys, *words)[0] == 0
    assert set(read_table(path).entries) == {*KEYS, decode}


def put_calls(path) -> list[Exact]:
    """The calls of a file, the busiest first: a training step of grouped heads, and decoding from pages."""
    step = Problem(128, 128, torch.bfloat16, right=True, grouped=True, rounding=True)
    problems = {"grad_query": step, "forward": step, "decode": Problem(128, 128, torch.float16, block_table=True)}
    sizes = [Size(1, 32, 4096, 4096, group=4), Size(1, 32, 2048, 2048, group=4), Size(8, 8, 1, 4096, page=16)]
    found = [Call(Exact(*of), size) for of, size in zip(problems.items(), sizes, strict=True)]
    Calls(dict.fromkeys(found, 7)).write(path)
    return [call.of for call in found]


def test_the_calls_of_a_file_are_searched_for(on_h100, user, tmp_path, capsys):
    """Each with its size, in its dtype; their entries serve them, next to those of keys."""
    run(capsys, *SEARCH)
    calls = put_calls(tmp_path / "calls.json")
    status, out, _ = run(capsys, "tune", "--calls", str(tmp_path / "calls.json"))
    assert status == 0
    assert list(on_h100) == KEYS + calls
    assert on_h100[calls[-1]] == Size(8, 8, 1, 4096, page=16)
    assert str(calls[0]) in out
    assert set(read_table(user / "h100.json").entries) == {*KEYS, *calls}
    assert lookup.find(*calls[0], H100).key == calls[0]
    _, out, _ = run(capsys, "tune", "--calls", str(tmp_path / "calls.json"))
    assert "3 of 3 keys are measured already" in out
    assert list(on_h100) == KEYS + calls
