"""Launches of small calls on a GPU, and their torch operators, each of which is one launch more."""

from perf.cpu.launches import calls, measured
from tests.support.shells import leave_bodies_out
from tests.support.versions import skip_without_stub

LAUNCHES_AND_OPERATORS = [(1, 0), (1, 1), (3, 3), (4, 0), (4, 1), (8, 11), (2, 0), (2, 5), (2, 11), (1, 7)]


def test_work_of_each_call(monkeypatch, tmp_path):
    skip_without_stub()
    leave_bodies_out(monkeypatch, tmp_path)
    rows = measured(rounds=1, capability=90)
    assert [name for name, *_ in rows] == list(calls())
    assert [tuple(row[-2:]) for row in rows] == LAUNCHES_AND_OPERATORS
    assert all(float(least) > 0 for _, least, *_ in rows)
