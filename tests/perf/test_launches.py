"""Launches of small calls on a GPU, and their torch operators, each of which is one launch more."""

from __future__ import annotations

import pytest

pytest.importorskip("triton")
from perf.launches import calls, measured
from tests.support.versions import skip_without_stub

# Launches and torch operators.
WORK = {
    "forward, sqrt_dim": (1, 0),
    "forward, key_count": (1, 2),
    "forward, key_norm_sum": (3, 3),
    "with backward, sqrt_dim": (4, 0),
    "with backward, key_count": (4, 2),
    "with backward, key_norm_sum": (8, 8),
    "decode, sqrt_dim": (2, 0),
    "decode, key_count": (2, 8),
    "decode, key_norm_sum and KeyStatistics": (2, 11),
    "packed, sqrt_dim": (1, 7),
}


def test_work_of_each_call():
    skip_without_stub()
    rows = measured(rounds=1, capability=90)
    assert [name for name, *_ in rows] == list(calls()) == list(WORK)
    assert {name: work for name, *_, launches, operators in rows if (work := (launches, operators)) != WORK[name]} == {}
    assert all(float(least) > 0 for _, least, *_ in rows)
