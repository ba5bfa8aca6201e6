"""Cases of a test that `make test` leaves to `make test-slow`."""

from collections.abc import Iterable
from typing import Any

import pytest


def slow_but(fast: Iterable[Any], cases: Iterable[Any]) -> list[Any]:
    """The cases, marked slow but for those in `fast`."""
    kept = list(fast)
    return [case if case in kept else pytest.param(case, marks=pytest.mark.slow) for case in cases]
