"""Keep the garbage collector away from modules and collected tests."""

import gc


def pytest_collectstart() -> None:
    gc.disable()


def pytest_collection_finish() -> None:
    """Leave modules and collected tests, 800,000 objects that stay, out of every search for garbage.

    A sweep of perf calls gc.collect() after each case, which would take a third of a second.
    """
    gc.collect()
    gc.freeze()
    gc.enable()


def pytest_unconfigure() -> None:
    gc.unfreeze()
