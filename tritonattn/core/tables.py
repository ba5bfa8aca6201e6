"""Tables of text, for a terminal or for GitHub."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, Literal


def table(
    rows: Iterable[Sequence[Any]],
    headers: Sequence[Any],
    style: Literal["github", "simple"] = "github",
    left: int | None = 1,
) -> str:
    """Lay out a table whose cells are shown as they are; the first `left` columns (None: all) are aligned left.

    Raises ImportError, with the pip command, without tabulate.
    """
    try:
        from tabulate import tabulate
    except ImportError as error:
        raise ImportError("tables need tabulate: pip install 'tritonattn[demo]'") from error
    names = list(map(str, headers))
    count = len(names) if left is None else left
    sides = ["left"] * count + ["right"] * (len(names) - count)
    return tabulate(rows, names, tablefmt=style, disable_numparse=True, colalign=sides)
