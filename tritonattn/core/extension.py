"""Extension of functions of other libraries, once in a process."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

_EXTENDED = "_extended_by_tritonattn"


def extend(owner: Any, name: str, extended: Callable[[Any], Any]) -> None:
    """Replace a function of a class or module, once; do nothing where there is none."""
    original = getattr(owner, name, None)
    if original is not None and not hasattr(original, _EXTENDED):
        function = functools.wraps(original)(extended(original))
        setattr(function, _EXTENDED, True)
        setattr(owner, name, function)
