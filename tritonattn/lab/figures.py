"""The look that pictures share: colours, marks, dashes, ticks, and the line that says where the numbers come from."""

from __future__ import annotations

import io
import math
import textwrap
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.colors import to_hex
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.lines import Line2D
from matplotlib.ticker import (
    AutoLocator,
    FuncFormatter,
    LogLocator,
    MaxNLocator,
    NullFormatter,
    NullLocator,
    SymmetricalLogLocator,
)

from ..core.records import write

# The palette of Okabe and Ito, which colour-blind readers can tell apart, without its yellow, which paper swallows;
# then a grey and a wine.
COLOURS = ("#000000", "#D55E00", "#0072B2", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#777777", "#882255")
_DASHES = ((), (5, 1.5), (1, 1), (6, 1.5, 1, 1.5), (2.5, 1))  # strokes and gaps, in widths of the line; () is solid
_MARKERS = "osD^vXP*p<"
_SMALL, _LEGEND = 8, 9  # font sizes of the source and of legends


def style(index: int) -> dict[str, Any]:
    """The look of line number `index`: no two of the first 90 have the same colour and marker."""
    return {
        "color": COLOURS[index % len(COLOURS)],
        "marker": _MARKERS[index % len(_MARKERS)],
        "linestyle": (0, _DASHES[index % len(_DASHES)]) if index % len(_DASHES) else "-",
        "markersize": 4,
        "linewidth": 1.3,
    }


def ramp(count: int) -> list[str]:
    """Return colours from dark to light, for more lines in an order than the palette has colours."""
    return [to_hex(colormaps["plasma"](0.8 * index / (count - 1))) for index in range(count)]  # without its yellow end


def styles(names: Iterable[str]) -> dict[str, dict[str, Any]]:
    """A look for each name, in their order."""
    return {name: style(index) for index, name in enumerate(dict.fromkeys(names))}


def staggered(index: int, series: int, points: int) -> tuple[int, int]:
    """`markevery` of one of several lines: those that coincide show their marks in turn."""
    every = max(1, min(series, points // 3))
    return index % every, every


def dodge(index: int, series: int, width: float) -> float:
    """The shift of one of several marks at one position; together they take `width`."""
    return ((index + 0.5) / series - 0.5) * width


def whole_numbers(axis: Axis) -> None:
    """Put ticks at integers only."""
    axis.set_major_locator(MaxNLocator("auto", integer=True, min_n_ticks=1))
    axis.set_major_formatter("{x:,.0f}")


def plain_numbers(axis: Axis) -> None:
    """Label a logarithmic axis, drawn on already, 0.1, 0.2, 0.5, 1, not by powers of ten."""
    low, high = axis.get_view_interval()
    decades = math.log10(high / low) if low > 0 else math.inf
    subs = (1, 1.5, 2, 3, 4, 5, 7) if decades < 1 else (1, 2, 5)
    if decades < 0.5:
        axis.set_major_locator(AutoLocator())
    elif axis.get_scale() == "symlog":
        axis.set_major_locator(SymmetricalLogLocator(axis.get_transform(), subs=subs))
    else:
        axis.set_major_locator(LogLocator(subs=subs if decades < 3 else (1,)))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.set_minor_formatter(NullFormatter())


def ticks_at(axis: Axis, values: Sequence[int]) -> None:
    """Put ticks at these numbers of a logarithmic axis, and nowhere else."""
    axis.set_ticks(list(values), [f"{value:,}" for value in values], fontsize=8)
    axis.set_minor_locator(NullLocator())


def values_at_right(axes: Axes, texts: Sequence[str]) -> None:
    """Write a text per row at the right of a chart with one row per series."""
    for row, text in enumerate(texts):
        axes.annotate(text, (1.0, row), (4, 0), ("axes fraction", "data"), "offset points", va="center", fontsize=8)


def panels(
    count: int, columns: int, size: tuple[float, float], label: str, *, sharey: bool = False, **text
) -> tuple[Figure, list[Axes]]:
    """Make a figure of panels over the same x, which the lowest of each column names.

    size   inches of height: of a row of panels, and of the rest
    """
    rows = math.ceil(count / columns)
    figure = Figure(figsize=(10.5, size[0] * rows + size[1]), layout="constrained")
    grid = figure.subplots(rows, columns, sharex=True, sharey=sharey, squeeze=False).flat
    for axes in grid[count:]:
        axes.set_axis_off()
    for axes in grid[max(0, count - columns) : count]:
        axes.set_xlabel(label, **text)
        axes.tick_params(labelbottom=True)
    return figure, list(grid[:count])


def foot(figure: Figure, source: str, looks: dict[str, dict[str, Any]] | None = None, columns: int = 5, **text) -> None:
    """Write below a figure where its numbers come from, wrapped to its width, and above that a legend of all panels."""
    lines = textwrap.wrap(source, int(figure.get_figwidth() * 72 / (0.6 * _SMALL)), break_on_hyphens=False)
    height = _height(figure, len(lines), _SMALL)
    figure.text(0.5, height / 2, "\n".join(lines), fontsize=_SMALL, ha="center", va="center", **text)
    if looks is not None:
        handles = [Line2D([], [], **look) for look in looks.values()]
        where = {"loc": "lower center", "bbox_to_anchor": (0.5, height), "borderaxespad": 0}
        figure.legend(handles, list(looks), ncols=columns, fontsize=_LEGEND, handlelength=3, **where)
        height += _height(figure, math.ceil(len(looks) / columns), _LEGEND)
    engine = figure.get_layout_engine()
    assert isinstance(engine, ConstrainedLayoutEngine)
    engine.set(rect=(0, height, 1, 1 - height))


def _height(figure: Figure, lines: int, size: float) -> float:
    """The height of lines of a font size, and of a margin, as a share of the figure's."""
    return (1.6 * lines + 0.8) * size / 72 / figure.get_figheight()


def save(figure: Figure, file: Path, dpi: int = 120) -> None:
    """Write a figure in the format of the file's ending."""
    picture = io.BytesIO()
    figure.savefig(picture, format=file.suffix[1:], dpi=dpi)
    write(file, picture.getvalue())
