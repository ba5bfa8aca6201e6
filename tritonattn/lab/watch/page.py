"""A watched run as one HTML file: the picture as inline SVG, its alarms and latest values; nothing to fetch."""

from __future__ import annotations

import io
import math
from html import escape
from pathlib import Path

import matplotlib

from ...core import records
from .curves import MEASURES, Watched
from .picture import figure_of

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


def write(watched: Watched, file: Path) -> None:
    """Write the page."""
    records.write(
        file,
        f"""<!doctype html>
<html lang="en">
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{escape(watched.name)}</title>
<style>{_STYLE}</style>
<h1>Attention while it trains</h1>
{_picture(watched)}
{_alarms(watched)}
{_latest(watched)}
</html>
""",
    )


def _picture(watched: Watched) -> str:
    """The svg element, its texts as text."""
    drawn = io.StringIO()
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": watched.name}):
        figure_of(watched).savefig(drawn, format="svg", metadata=dict.fromkeys(("Creator", "Date", "Format", "Type")))
    text = drawn.getvalue()
    return text[text.index("<svg") :]


def _alarms(watched: Watched) -> str:
    alarms = watched.alarms
    if not alarms:
        return ""
    items = "".join(f"<li>{escape(f'step {one.step}: {one}')}</li>" for one in alarms)
    is_open = " open" if len(alarms) <= _FEW else ""
    return f"<h2>Alarms</h2>\n<details{is_open}><summary>{len(alarms)}</summary>\n<ul>{items}</ul></details>"


def _latest(watched: Watched) -> str:
    layers = watched.latest()
    if not layers:
        return ""
    measures = [name for name in MEASURES if any(name in values for values in layers.values())]
    head = "".join(f"<th>{MEASURES[name][0]}</th>" for name in measures)
    rows = ""
    for layer, values in layers.items():
        numbers = "".join(f"<td>{values.get(name, math.nan):.3g}</td>" for name in measures).replace("nan", "-")
        rows += f"<tr><td>{escape(layer)}</td>{numbers}</tr>\n"
    return f'<h2>The latest step</h2>\n<div class="table"><table><tr><th>layer</th>{head}</tr>\n{rows}</table></div>'
