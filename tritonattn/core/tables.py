"""Tables of text, for a terminal or for GitHub."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import chain, zip_longest
from typing import Any, Literal

_ROOM = 2  # characters by which a column is at least wider than its header


def table(
    rows: Iterable[Sequence[Any]],
    headers: Sequence[Any],
    style: Literal["github", "simple"] = "github",
    left: int | None = 1,
) -> str:
    """Lay out a table whose cells are shown as they are; the first `left` columns (None: all) are aligned left.

    None is an empty cell. Cells and headers of style "simple" may have several lines.
    """
    grid = [[_lines(cell) for cell in row] for row in (headers, *rows)]
    widths = [max(len(line) for line in lines) + _ROOM for lines in grid[0]]
    widths = [max(width, *(len(line) for row in grid for line in row[at])) for at, width in enumerate(widths)]
    sides = [str.ljust if left is None or at < left else str.rjust for at in range(len(widths))]

    def laid(cells: Sequence[str]) -> str:
        padded = [side(cell, width) for side, cell, width in zip(sides, cells, widths, strict=True)]
        return f"| {' | '.join(padded)} |" if style == "github" else "  ".join(padded).rstrip()

    rule = laid(["-" * width for width in widths])
    head, *body = [[laid(cells) for cells in zip_longest(*row, fillvalue="")] for row in grid]
    return "\n".join([*head, rule.replace(" ", "-") if style == "github" else rule, *chain(*body)])


def _lines(cell: Any) -> list[str]:
    return [line.strip() for line in ("" if cell is None else str(cell)).split("\n")]
