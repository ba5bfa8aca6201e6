"""Which cases of a test are slow ones."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import pytest


def marked(cases: Iterable[tuple], quick: Callable[..., bool]) -> list:
    """The cases, slow but for those that `quick` accepts."""
    return [pytest.param(*case, marks=() if quick(*case) else pytest.mark.slow) for case in cases]
