"""A watched run as a picture, and as a page: one HTML file with the picture as inline SVG and nothing to fetch."""

from __future__ import annotations

import io
import math
from html import escape
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from ...analysis.alarms import LOSS
from ...core import records
from ..figures import COLOURS, foot, panels, plain_numbers, ramp, staggered, style, styles, whole_numbers
from .curves import MEASURES, Panel, Watched

_ALARM = {"color": "black", "marker": "o", "markersize": 8, "markerfacecolor": "none", "linestyle": "none"}
_LIMIT = {"color": "black", "linestyle": "--", "linewidth": 0.8}
_ABOUT = {
    "layer": "Each line is a layer: its heads' largest logit, or the mean over its heads",
    "run": "Each line is a run: its layers' largest logit, or the mean over its layers",
}
_FEW = 20  # alarms that are shown unasked
_STYLE = """
:root { color-scheme: light; }
body { margin: 1rem auto; max-width: 100rem; padding: 0 1rem; font: 15px/1.4 sans-serif; }
h1 { font-size: 1.3rem; }
h2 { font-size: 1.1rem; margin-top: 1.5rem; }
svg { display: block; width: 100%; height: auto; }
.table { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { padding: 0.15rem 0.7rem; border-bottom: 1px solid #ddd; text-align: right; }
th:first-child, td:first-child { text-align: left; }
"""


def figure_of(watched: Watched) -> Figure:
    """Draw a panel per measure over the same steps, and a line per layer or run."""
    figure, grid = panels(len(watched.panels), min(3, len(watched.panels)), (2.7, 1.4), "step")
    looks = _looks(list(watched.lines))
    shared: dict[str, Axes] = {}
    for axes, panel in zip(grid, watched.panels, strict=True):
        if (first := shared.setdefault(panel.axis or panel.measure, axes)) is not axes:
            axes.sharey(first)
        _draw(axes, panel, looks)
    for axes, panel in zip(grid, watched.panels, strict=True):
        if panel.logarithmic:
            plain_numbers(axes.yaxis)
    whole_numbers(grid[0].xaxis)
    names = watched.short_names()
    legend = {f"{watched.series} {names[name]}": looks[name] for name in _some(list(names))}
    if any(run.alarms for run in watched.runs):
        legend |= {"alarm": _ALARM, "its threshold": _LIMIT}
    foot(figure, f"{watched.summary()}. {_ABOUT[watched.series]}.", legend, columns=6)
    return figure


def _looks(layers: list[str]) -> dict[str, dict[str, Any]]:
    """Colours, dashes and marks for a few layers; from dark to light for many."""
    if len(layers) <= len(COLOURS):
        return styles(layers)
    return {name: {"color": colour, "linewidth": 1} for name, colour in zip(layers, ramp(len(layers)), strict=True)}


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


def write_page(watched: Watched, file: Path) -> None:
    """Draw the picture, its alarms and latest values into an HTML file."""
    records.write(
        file,
        f"""<!doctype html>
<html lang="en">
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{escape(", ".join(run.name for run in watched.runs))}</title>
<style>{_STYLE}</style>
<h1>Attention while it trains</h1>
{_picture(watched)}
{_alarms(watched)}
{_latest(watched)}
</html>
""",
    )


def _picture(watched: Watched) -> str:
    drawn = io.StringIO()
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": watched.summary()}):
        figure_of(watched).savefig(drawn, format="svg", metadata=dict.fromkeys(("Creator", "Date", "Format", "Type")))
    text = drawn.getvalue()
    return text[text.index("<svg") :]


def _alarms(watched: Watched) -> str:
    texts = [
        f"{f'{run.name}, ' * (watched.series == 'run')}step {one.step}: {one}"
        for run in watched.runs
        for one in run.alarms
    ]
    if not texts:
        return ""
    items = "".join(f"<li>{escape(text)}</li>" for text in texts)
    is_open = " open" if len(texts) <= _FEW else ""
    return f"<h2>Alarms</h2>\n<details{is_open}><summary>{len(texts)}</summary>\n<ul>{items}</ul></details>"


def _latest(watched: Watched) -> str:
    latest = {name: run.latest() for name, (run, _) in watched.lines.items()}
    values = {
        measure: {name: record.value(measure, watched.lines[name][1]) for name, record in latest.items()}
        for measure in MEASURES
        if measure != LOSS or watched.series == "run"
    }
    values = {measure: of for measure, of in values.items() if not all(map(math.isnan, of.values()))}
    if not values:
        return ""
    head = "".join(f"<th>{MEASURES[measure][0]}</th>" for measure in values)
    rows = ""
    for name in latest:
        numbers = "".join(f"<td>{of[name]:.3g}</td>" for of in values.values()).replace("nan", "-")
        rows += f"<tr><td>{escape(name)}</td>{numbers}</tr>\n"
    table = f'<div class="table"><table><tr><th>{watched.series}</th>{head}</tr>\n{rows}</table></div>'
    return f"<h2>The latest step</h2>\n{table}"
