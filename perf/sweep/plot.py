"""Draw the records of `python -m perf sweep`: throughput under the roofline, ratios, overheads, bandwidth, errors."""

from __future__ import annotations

import argparse
import math
import re
import statistics
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from tritonattn.cli.options import make_folder
from tritonattn.lab.figures import foot, plain_numbers, save, staggered, styles, ticks_at

from ..cases.records import Record, read_all
from ..cases.roofline import COPY, MATMUL, SUITE
from .report import implementation

Points = dict[float | str, float]  # y by x: a length, or a distribution of keys


@dataclass(frozen=True)
class Panel:
    """Measured lines by label, and dashed limits of the machine."""

    title: str
    lines: dict[str, Points]
    limits: dict[str, Points]


@dataclass(frozen=True)
class Chart:
    """A chart of a suite.

    y        a record's height; None leaves it out
    panels   the axes whose values get a panel each
    label    the name of a record's line
    errors   a logarithmic axis, and the median of records at one x; else the last
    even     the height at which a contestant is as fast as the one it is compared with
    """

    name: str
    suite: str
    ylabel: str
    y: Callable[[Record], float | None]
    panels: tuple[str, ...]
    label: Callable[[Record], str] = implementation
    x: str = "length"
    limits: Callable[[list[Record], dict[str, Record]], dict[str, Points]] = lambda records, ceilings: {}
    errors: bool = False
    even: float | None = None


def _ratio_of_others(record: Record) -> float | None:
    return None if record.contestant == record.baseline else record.ratio


def _overhead(record: Record) -> float | None:
    return None if record.ratio is None or record.contestant == record.baseline else 100 * (record.ratio - 1)


def _bandwidth(record: Record) -> float | None:
    return None if record.contestant == COPY else record.gbps


def _roofline(records: list[Record], ceilings: dict[str, Record]) -> dict[str, Points]:
    """Take the lower of the product of matrices and the copy's bandwidth times operations a byte, in TFLOP/s."""
    product, copy = ceilings.get(f"{MATMUL} {records[0].axes['dtype']}"), ceilings.get(COPY)
    if product is None or copy is None:
        return {}
    heights = {r.axes["length"]: min(product.tflops, copy.gbps * r.tflops / r.gbps) for r in records if r.tflops}
    return {"roofline": heights}


def _copy(records: list[Record], ceilings: dict[str, Record]) -> dict[str, Points]:
    if COPY not in ceilings:
        return {}
    return {"copy": dict.fromkeys((r.axes["length"] for r in records), ceilings[COPY].gbps)}


def _error(record: Record) -> float | None:
    return record.error or None


def _contestant(record: Record) -> str:
    return record.contestant


def _scaling(record: Record) -> str:
    return record.scaling


_PASSES = ("forward", "backward")
_SHAPE, _PACKED = ("head_dim", "dtype", "causal"), ("head_dim", "dtype", "passes", "scaling")
CHARTS = (
    *(Chart(f"{x}_tflops", x, "TFLOP/s", lambda r: r.tflops, (*_SHAPE, "scaling"), limits=_roofline) for x in _PASSES),
    *(Chart(f"{x}_ratio", x, "time over ours", _ratio_of_others, (*_SHAPE, "scaling"), even=1) for x in _PASSES),
    Chart("cpu_ratio", "cpu", "time over plain SDPA", _ratio_of_others, (*_SHAPE, "passes"), _contestant, even=1),
    Chart("overhead", "overhead", "% over sqrt_dim", _overhead, ("head_dim", "dtype", "passes"), _scaling, even=0),
    Chart("scaling", "scaling", "time over ours", _ratio_of_others, _SHAPE, x="scaling", even=1),
    Chart("decode", "decode", "GB/s", _bandwidth, ("head_dim", "dtype", "paged", "scaling"), limits=_copy),
    Chart("varlen", "varlen", "time over padded", _ratio_of_others, _PACKED, even=1),
    Chart("accuracy_by_count", "accuracy", "error, median of the scalings", _error, ("dtype", "keys"), errors=True),
    Chart(
        "accuracy_by_scaling", "accuracy", "error, median of the cases", _error, ("dtype",), x="scaling", errors=True
    ),
    Chart("accuracy_by_keys", "accuracy", "error, median of the scalings", _error, ("dtype",), x="keys", errors=True),
)


def panels_of(chart: Chart, records: list[Record]) -> list[Panel]:
    """List the panels of a chart that have something to show."""
    ceilings = {_ceiling_name(record): record for record in records if record.suite == SUITE}
    measured = [record for record in records if record.suite == chart.suite and record.status == "measured"]
    found = []
    for values in dict.fromkeys(tuple(r.axes.get(axis) for axis in chart.panels) for r in measured):
        of_panel = [r for r in measured if tuple(r.axes.get(axis) for axis in chart.panels) == values]
        lines: dict[str, dict[float | str, list[float]]] = {}
        for record in of_panel:
            x, y = record.axes.get(chart.x, record.scaling), chart.y(record)
            if y is not None:
                lines.setdefault(chart.label(record), {}).setdefault(x, []).append(y)
        title = ", ".join(_named(axis, value) for axis, value in zip(chart.panels, values, strict=True))
        if lines:
            one = statistics.median if chart.errors else lambda heights: heights[-1]
            joined = {label: {x: one(ys) for x, ys in line.items()} for label, line in lines.items()}
            found.append(Panel(title, joined, chart.limits(of_panel, ceilings)))
    return found


def _ceiling_name(record: Record) -> str:
    return f"{MATMUL} {record.axes['dtype']}" if record.contestant == MATMUL else record.contestant


def _named(axis: str, value: object) -> str:
    words = {"causal": {True: "causal", False: "full"}, "paged": {True: "paged", False: "contiguous"}}
    return words.get(axis, {}).get(value, f"head_dim {value}" if axis == "head_dim" else str(value))


def draw(chart: Chart, records: list[Record], path: Path) -> None:
    """Write a chart, whose panels share their axes."""
    panels = panels_of(chart, records)
    columns = min(4, len(panels))
    rows = math.ceil(len(panels) / columns)
    figure = Figure(figsize=(max(6.5, 3.6 * columns), 2.8 * rows + 1.6), layout="constrained")
    looks = styles(label for panel in panels for label in panel.lines)
    limits = {"color": "black", "linestyle": "--", "linewidth": 1}
    grid = figure.subplots(rows, columns, squeeze=False, sharex=True, sharey=True)
    for axes in grid.flat[len(panels) :]:
        axes.set_axis_off()
    for panel, axes in zip(panels, grid.flat, strict=False):
        if chart.even is not None:
            axes.axhline(chart.even, color="grey", linewidth=1)
        for index, (label, points) in enumerate(panel.lines.items()):
            xs, ys = _sorted(points)
            marks = staggered(index, len(panel.lines), len(xs))
            axes.plot(xs, ys, **looks[label], markevery=marks)
        for points in panel.limits.values():
            axes.plot(*_sorted(points), **limits)
        axes.set_title(panel.title, fontsize=9)
        axes.grid(alpha=0.3)
    _scales(chart, panels, grid)
    looks |= {label: limits for panel in panels for label in panel.limits}
    last = [record for record in records if record.suite == chart.suite][-1]
    foot(figure, f"{last.origin}: {last.environment}, {last.date}", looks, columns=2 * columns)
    save(figure, path)


def _scales(chart: Chart, panels: list[Panel], grid: Any) -> None:
    """Set the scales and ticks that all panels share."""
    first = grid.flat[0]
    if chart.errors or chart.even == 1:
        first.set_yscale("log")
    if chart.even == 1:
        plain_numbers(first.yaxis)
    xs = {x for panel in panels for points in panel.lines.values() for x in points}
    numbers = sorted(x for x in xs if not isinstance(x, str))
    if numbers:
        first.set_xscale("log", base=2)
        ticks_at(first.xaxis, numbers)
    for axes in grid[:, 0]:
        axes.set_ylabel(chart.ylabel)
    for axes in grid.flat[max(0, len(panels) - grid.shape[1]) : len(panels)]:  # the lowest of each column
        axes.set_xlabel(chart.x)
        axes.tick_params(axis="x", labelbottom=True, labelrotation=0 if len(xs) < 5 else 90, labelsize=8)


def _sorted(points: Points) -> tuple[list, list]:
    """Sort numbers; keep words in their order."""
    numbers = all(isinstance(x, (int, float)) for x in points)
    xs = sorted(points) if numbers else list(points)
    return xs, [points[x] for x in xs]


def drawings(records: list[Record]) -> dict[str, tuple[Chart, list[Record]]]:
    """List, for every device, each chart that has something to show, by the name of its file."""
    devices = list(dict.fromkeys(record.environment.device for record in records))
    found = {}
    for device in devices:
        of_device = [record for record in records if record.environment.device == device]
        suffix = "" if len(devices) == 1 else "_" + re.sub(r"\W+", "-", device).strip("-").lower()
        found |= {f"{chart.name}{suffix}.png": (chart, of_device) for chart in CHARTS if panels_of(chart, of_device)}
    return found


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("files", nargs="+", type=Path, help="written by `python -m perf sweep --json`")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="where the .png files go")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> None:
    """Draw every chart that has something to show."""
    found = drawings(read_all(arguments.files))
    if not found:
        sys.exit(f"plot: nothing measured in {', '.join(map(str, arguments.files))}")
    make_folder("--out", arguments.out)
    for name, (chart, records) in found.items():
        draw(chart, records, arguments.out / name)
        print(arguments.out / name)
