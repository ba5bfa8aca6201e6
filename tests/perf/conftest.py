"""Sweeps in tests leave garbage to Python: a search after each of their cases took most of their time."""

import pytest


@pytest.fixture(autouse=True)
def _no_search_for_garbage(monkeypatch: pytest.MonkeyPatch) -> None:
    from perf.sweep import run as run_suites

    monkeypatch.setattr(run_suites, "_free", lambda device: None)
