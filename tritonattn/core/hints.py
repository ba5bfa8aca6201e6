"""Hints for keyword arguments that a function or a class does not have, and warnings."""

from __future__ import annotations

import difflib
import functools
import inspect
import sys
import warnings
from collections.abc import Iterable, Sequence
from typing import Any, TypeVar

from torch import Tensor

T = TypeVar("T")

_LISTED = 8  # arguments at most that a hint lists


def shortened(names: Sequence[str]) -> str:
    """Names in a line: of more than four the first two and the last."""
    return ", ".join(names if len(names) <= 4 else [*names[:2], "...", names[-1]])


def nearest(word: Any, names: Iterable[str]) -> str:
    """The end of a message that names the nearest of some names, or nothing where none is near."""
    close = difflib.get_close_matches(str(word), names, n=1)
    return f" (did you mean {close[0]!r}?)" if close else ""


def type_of(value: Any) -> str:
    """Describe a value for an error: its type, and for a tensor its dtype and shape."""
    if isinstance(value, Tensor):
        what = "nested tensor" if value.is_nested else f"tensor of shape {list(value.shape)}"
        return f"a {value.dtype} {what}"
    return f"{type(value).__name__} {value!r}" if isinstance(value, (str, int, float)) else type(value).__name__


def hint_for_keyword(word: str, known: Iterable[str]) -> str | None:
    """Name the arguments that there are, or of many the nearest one; None where none of many is near."""
    names = [name for name in known if name != "self"]
    close = difflib.get_close_matches(word, names, n=1)
    if len(names) > _LISTED:
        names = close
    if len(names) < 2:
        return f"expected {names[0]}=, got {word}=" if names else None
    hint = f" (did you mean {close[0]}=?)" if close else ""
    return f"expected one of {', '.join(f'{name}=' for name in names)}, got {word}={hint}"


@functools.cache
def warn_once(message: str) -> None:
    """`warn`, once a process."""
    warn(message)


def warn(message: str) -> None:
    """Warn at the line outside of this package that led here."""
    frame, level = sys._getframe(1), 2
    while frame.f_back is not None and frame.f_globals.get("__name__", "").partition(".")[0] == "tritonattn":
        frame, level = frame.f_back, level + 1
    warnings.warn(message, stacklevel=level)


def hinted(cls: type[T]) -> type[T]:
    """Class decorator: a keyword that the class does not have raises a TypeError that names those that it has."""
    plain: Any = cls.__init__

    @functools.wraps(plain)
    def init(self: Any, *arguments: Any, **keywords: Any) -> None:
        try:
            plain(self, *arguments, **keywords)
            return
        except TypeError:
            known = inspect.signature(plain).parameters
            unknown = [word for word in keywords if word not in known]
            hint = hint_for_keyword(unknown[0], known) if unknown else None
            if hint is None:
                raise
        raise TypeError(f"{type(self).__name__}: {hint}")

    cls.__init__ = init
    return cls
