"""Calls that are refused, with the error as a user reads it."""

from collections.abc import Callable
from typing import Any

import pytest


def refuses(error: str, call: Callable, *arguments: Any, **keywords: Any) -> None:
    """The call raises an error of that type and message, of which the parts between " ~ " are looked for."""
    with pytest.raises(Exception) as caught:  # noqa: PT011  all of it is compared
        call(*arguments, **keywords)
    found = f"{caught.type.__name__}: {caught.value}"
    error_type, message = error.split(": ", 1)
    missing = [part for part in (f"{error_type}: ", *message.split(" ~ ")) if part.removeprefix("~ ") not in found]
    assert not missing, f"{found} lacks {missing}"
