"""Extension of functions of other libraries, once in a process."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from .private_names import PRIVATE_NAMES, message

_EXTENDED = "_extended_by_tritonattn"


def extend(owner: Any, name: str, extended: Callable[[Any], Any]) -> None:
    """Replace a function of a class or module, once; do nothing where there is none.

    Raises ImportError where the missing function is one of PRIVATE_NAMES.
    """
    original = getattr(owner, name, None)
    home = ".".join((owner.__module__, owner.__qualname__)) if isinstance(owner, type) else owner.__name__
    if original is None and f"{home}.{name}" in PRIVATE_NAMES:
        raise ImportError(message(f"{home}.{name}"))
    if original is not None and not hasattr(original, _EXTENDED):
        function = functools.wraps(original)(extended(original))
        setattr(function, _EXTENDED, True)
        setattr(owner, name, function)
