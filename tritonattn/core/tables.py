"""Tables of text, for a terminal or for GitHub."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, Literal


def table(
    rows: Iterable[Sequence[Any]],
    headers: Sequence[Any],
    style: Literal["github", "simple"] = "github",
    align: Literal["left", "right"] = "right",
) -> str:
    """Lay out a table whose cells are shown as they are; the first column is aligned left, the others as `align` says.

    Raises ImportError, with the pip command, without tabulate.
    """
    try:
        from tabulate import tabulate
    except ImportError as error:
        raise ImportError("tables need tabulate: pip install 'tritonattn[demo]'") from error
    return tabulate(
        rows, list(map(str, headers)), tablefmt=style, disable_numparse=True, stralign=align, colalign=("left",)
    )
