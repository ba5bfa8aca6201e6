"""Leave out what needs triton where it is missing, and keep the garbage collector away from collected tests."""

import gc
from importlib.util import find_spec

import pytest

if find_spec("triton") is None:
    collect_ignore = ["compiled", "emulated", "kernels", "perf", "stub_tests", "autotune", "tuning", "slow/emulated"]


def pytest_collectstart() -> None:
    gc.disable()


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark what lies in tests/slow, before -m chooses by marks."""
    for item in items:
        if item.nodeid.startswith("tests/slow/"):
            item.add_marker("slow")


def pytest_collection_finish() -> None:
    """Leave modules and collected tests, 800,000 objects that stay, out of every search for garbage.

    A sweep of perf calls gc.collect() after each case, which would take a third of a second.
    """
    gc.collect()
    gc.freeze()
    gc.enable()


def pytest_unconfigure() -> None:
    gc.unfreeze()
