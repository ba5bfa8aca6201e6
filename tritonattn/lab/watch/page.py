"""A watched run as one HTML file: inline SVG, no script, nothing to fetch."""

from __future__ import annotations

import math
from html import escape
from pathlib import Path

from ...core import records
from ..palette import DASHES, ordered
from .curves import MEASURES, Panel, Points, Watched, short_names, span

WIDTH, HEIGHT = 360, 210  # of a panel
LEFT, RIGHT, TOP, BOTTOM = 52, 12, 12, 26  # its margins
_FEW = 20  # alarms that are shown unasked
_STYLE = """
:root { color-scheme: light; }
body { margin: 1rem auto; max-width: 100rem; padding: 0 1rem; font: 15px/1.4 sans-serif; }
h1 { font-size: 1.3rem; }
h2 { font-size: 1.1rem; margin-top: 1.5rem; }
p { overflow-wrap: anywhere; }
main { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 22rem), 1fr)); gap: 1rem; }
figure { margin: 0; }
figcaption { text-align: center; }
svg { display: block; width: 100%; height: auto; font: 11px sans-serif; }
svg.key { display: inline; width: 3rem; height: 0.8rem; }
.line { fill: none; stroke-width: 1.6; }
svg:hover g.line { opacity: 0.25; }
svg g.line:hover { opacity: 1; stroke-width: 3; }
.layers { display: flex; flex-wrap: wrap; gap: 0.2rem 1.2rem; padding: 0; list-style: none; }
.table { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { padding: 0.15rem 0.7rem; border-bottom: 1px solid #ddd; text-align: right; }
th:first-child, td:first-child { text-align: left; }
"""


def write(watched: Watched, file: Path) -> None:
    """Write the page."""
    layers = watched.layers
    looks = {"": ("#000000", "")}
    for index, (name, colour) in enumerate(zip(layers, ordered(len(layers)), strict=True)):
        looks[name] = colour, " ".join(f"{1.6 * length:g}" for length in DASHES[index % len(DASHES)])
    panels, steps = watched.panels, [record.step for record in watched.records]
    figures = "\n".join(_figure(panel, span(panel, panels), steps, looks) for panel in panels)
    records.write(
        file,
        f"""<!doctype html>
<html lang="en">
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{escape(watched.name)}</title>
<style>{_STYLE}</style>
<h1>Attention while it trains</h1>
<p>{escape(watched.summary())}. Each line is a layer: its heads' largest logit, or the mean over its heads. Circles are
alarms where they begin, dashed horizontals their thresholds. From left to right: steps.</p>
{_legend(layers, looks)}
<main>
{figures}
</main>
{_alarms(watched)}
{_latest(watched)}
</html>
""",
    )


def _legend(layers: list[str], looks: dict[str, tuple[str, str]]) -> str:
    names = short_names(layers)
    items = (
        f'<li><svg class="key" viewBox="0 0 48 12" aria-hidden="true">{_path("M0 6H48", *looks[name])}</svg> '
        f"{escape(names[name])}</li>"
        for name in layers
    )
    return f'<ul class="layers"><li>Layers:</li>{"".join(items)}</ul>'


def _path(d: str, colour: str, dashes: str) -> str:
    dashed = f' stroke-dasharray="{dashes}"' if dashes else ""
    return f'<path class="line" d="{d}" stroke="{colour}"{dashed}/>'


class _Scale:
    """From values to places on an axis."""

    def __init__(self, values: tuple[float, float], places: tuple[float, float], log: bool = False) -> None:
        self._of = math.log10 if log else float
        self._places = places
        self.low, self.high, self.log = *map(self._of, values), log

    def __call__(self, value: float) -> float:
        first, last = self._places
        return first + (self._of(value) - self.low) / (self.high - self.low) * (last - first)

    def ticks(self) -> list[float]:
        """Round numbers inside the axis."""
        decades = self.high - self.low
        if self.log and decades >= 1:
            powers = range(math.floor(self.low), math.floor(self.high) + 1, math.ceil(decades / 6))
            numbers = [times * 10.0**power for power in powers for times in ((1, 2, 5) if decades < 3 else (1,))]
            return [number for number in numbers if self.low <= math.log10(number) <= self.high]
        low, high = (10**self.low, 10**self.high) if self.log else (self.low, self.high)
        rough = (high - low) / 6
        unit = 10.0 ** math.floor(math.log10(rough))
        step = next(unit * times for times in (1, 2, 5, 10) if unit * times >= rough)
        return [number * step for number in range(math.ceil(low / step), math.floor(high / step) + 1)]


def _figure(panel: Panel, shown: tuple[float, float], steps: list[int], looks: dict[str, tuple[str, str]]) -> str:
    x = _Scale((min(steps), max(min(steps) + 1, max(steps))), (LEFT, WIDTH - RIGHT))
    y = _Scale(shown, (HEIGHT - BOTTOM, TOP), panel.logarithmic)
    parts = [f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(panel.title)} by step">']
    for tick in y.ticks():
        parts.append(f'<path d="M{LEFT} {y(tick):.1f}H{WIDTH - RIGHT}" stroke="#e4e4e4"/>')
        parts.append(f'<text x="{LEFT - 5}" y="{y(tick) + 4:.1f}" text-anchor="end">{tick:g}</text>')
    for tick in (tick for tick in x.ticks() if tick == round(tick)):
        parts.append(f'<text x="{x(tick):.1f}" y="{HEIGHT - 9}" text-anchor="middle">{tick:,.0f}</text>')
    for limit in panel.limits:
        parts.append(f'<path d="M{LEFT} {y(limit):.1f}H{WIDTH - RIGHT}" stroke="#222" stroke-dasharray="4 3"/>')
    for name, points in panel.curves.items():
        title = f"<title>{escape(name or panel.title)}</title>"
        parts.append(f'<g class="line">{title}{_curve(points, x, y, *looks[name])}</g>')
    for one in panel.alarms:
        height = TOP if one.value is None else y(one.value)
        ring = f'<circle cx="{x(one.step):.1f}" cy="{height:.1f}" r="4.5" fill="none" stroke="#222"'
        parts.append(f'{ring} pointer-events="all"><title>{escape(str(one))}</title></circle>')
    drawn = "\n".join([*parts, "</svg>"])
    return f"<figure><figcaption>{escape(panel.title)}</figcaption>\n{drawn}</figure>"


def _curve(points: Points, x: _Scale, y: _Scale, colour: str, dashes: str) -> str:
    """A path of the points, broken where a value is missing; a point without neighbours is a dot."""
    d, dots = "", ""
    for before, (step, value), after in zip([None, *points], points, [*points[1:], None], strict=False):
        if value is None:
            continue
        begins = before is None or before[1] is None
        place = f"{x(step):.1f} {y(value):.1f}"
        d += f"{'M' if begins else 'L'}{place}"
        if begins and (after is None or after[1] is None):
            dots += f'<circle cx="{x(step):.1f}" cy="{y(value):.1f}" r="3" fill="{colour}"/>'
    return _path(d, colour, dashes) + dots


def _alarms(watched: Watched) -> str:
    alarms = watched.alarms
    if not alarms:
        return ""
    items = "".join(f"<li>{escape(str(one))}</li>" for one in alarms)
    is_open = " open" if len(alarms) <= _FEW else ""
    return f"<h2>Alarms</h2>\n<details{is_open}><summary>{len(alarms)}</summary>\n<ul>{items}</ul></details>"


def _latest(watched: Watched) -> str:
    layers = watched.latest()
    if not layers:
        return ""
    measures = [name for name in MEASURES if any(name in values for values in layers.values())]
    head = "".join(f"<th>{escape(MEASURES[name][0])}</th>" for name in measures)
    rows = "".join(
        f"<tr><td>{escape(layer)}</td>{''.join(f'<td>{_number(values.get(name))}</td>' for name in measures)}</tr>\n"
        for layer, values in layers.items()
    )
    return f'<h2>The latest step</h2>\n<div class="table"><table><tr><th>layer</th>{head}</tr>\n{rows}</table></div>'


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.3g}"
