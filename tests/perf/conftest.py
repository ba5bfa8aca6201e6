"""Sweeps in tests leave garbage to Python: a search after each of their cases took most of their time.

And commands leave torch's threads as they were: two that wait for one another take the cores from all later tests.
"""

from collections.abc import Iterator

import pytest
import torch


@pytest.fixture(autouse=True)
def _no_search_for_garbage(monkeypatch: pytest.MonkeyPatch) -> None:
    from perf.sweep import run as run_suites

    monkeypatch.setattr(run_suites, "_free", lambda device: None)


@pytest.fixture(autouse=True)
def _threads_as_before() -> Iterator[None]:
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)
