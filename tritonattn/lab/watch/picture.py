"""A watched run as a picture."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from ..figures import COLOURS, foot, ordered, plain_numbers, save, staggered, style, whole_numbers
from .curves import Panel, Watched, short_names

_ALARM = {"color": "black", "marker": "o", "markersize": 8, "markerfacecolor": "none", "linestyle": "none"}
_LIMIT = {"color": "black", "linestyle": "--", "linewidth": 0.8}
_COLUMNS = 3


def draw(watched: Watched, file: Path) -> None:
    save(figure_of(watched), file)


def figure_of(watched: Watched) -> Figure:
    """Draw a panel a measure over the same steps, and a line a layer."""
    panels = watched.panels
    rows = math.ceil(len(panels) / _COLUMNS)
    figure = Figure(figsize=(10.5, 2.7 * rows + 1.4), layout="constrained")
    looks = _looks(watched.layers)
    grid = figure.subplots(rows, min(_COLUMNS, len(panels)), sharex=True, squeeze=False)
    for axes in grid.flat[len(panels) :]:
        axes.set_axis_off()
    shared: dict[str, Axes] = {}
    for axes, panel in zip(grid.flat, panels, strict=False):
        if (first := shared.setdefault(panel.axis or panel.measure, axes)) is not axes:
            axes.sharey(first)
        _draw(axes, panel, looks)
    for axes, panel in zip(grid.flat, panels, strict=False):
        if panel.logarithmic:
            plain_numbers(axes.yaxis)
    for axes in grid.flat[max(0, len(panels) - grid.shape[1]) : len(panels)]:  # the lowest of each column
        axes.set_xlabel("step")
        axes.tick_params(labelbottom=True)
    whole_numbers(grid.flat[0].xaxis)
    names = short_names(watched.layers)
    legend = {f"layer {names[name]}": looks[name] for name in _some(watched.layers)}
    if watched.alarms:
        legend |= {"alarm": _ALARM, "its threshold": _LIMIT}
    about = "Each line is a layer: its heads' largest logit, or the mean over its heads"
    foot(figure, f"{watched.summary()}. {about}.", legend, columns=6)
    return figure


def _looks(layers: list[str]) -> dict[str, dict[str, Any]]:
    """Colours, dashes and marks for a few layers; from dark to light for many."""
    colours = ordered(len(layers))
    if len(layers) <= len(COLOURS):
        return {name: {**style(index), "color": colours[index]} for index, name in enumerate(layers)}
    return {name: {"color": colour, "linewidth": 1} for name, colour in zip(layers, colours, strict=True)}


def _some(layers: list[str]) -> list[str]:
    """At most nine layers, the first and the last among them."""
    count = min(len(layers), len(COLOURS))
    return [layers[round(index * (len(layers) - 1) / max(1, count - 1))] for index in range(count)]


def _draw(axes: Axes, panel: Panel, looks: dict[str, dict[str, Any]]) -> None:
    for index, (name, points) in enumerate(panel.curves.items()):
        marks = staggered(index, len(panel.curves), len(points))
        axes.plot(*zip(*points, strict=True), **looks.get(name, style(0)), markevery=marks)
    for limit in panel.limits:
        axes.axhline(limit, **_LIMIT)
    axes.set_title(panel.title, fontsize=10)
    axes.set_yscale("log" if panel.logarithmic else "linear")
    if panel.axis == "share":
        axes.set_ylim(-0.05, 1.05)
    for one in panel.alarms:
        if math.isnan(one.value):  # at the upper edge
            axes.plot(one.step, 1, **_ALARM, transform=axes.get_xaxis_transform(), clip_on=False)
        else:
            axes.plot(one.step, one.value, **_ALARM)
