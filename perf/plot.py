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

from matplotlib.figure import Figure

from tritonattn.cli.options import make_folder

from .records import Record, read_all
from .report import implementation
from .roofline import COPY, MATMUL, SUITE

Points = dict[float | str, float]  # y by x: a length, or a kind of keys


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
    errors   a logarithmic axis, and the median of records at one place; else the last
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


_PASSES = ("forward", "backward")
_SHAPE, _PACKED = ("head_dim", "dtype", "causal"), ("head_dim", "dtype", "passes", "scaling")
CHARTS = (
    *(Chart(f"{x}_tflops", x, "TFLOP/s", lambda r: r.tflops, (*_SHAPE, "scaling"), limits=_roofline) for x in _PASSES),
    *(Chart(f"{x}_ratio", x, "time over ours", _ratio_of_others, (*_SHAPE, "scaling")) for x in _PASSES),
    Chart("cpu_ratio", "cpu", "time over plain SDPA", _ratio_of_others, (*_SHAPE, "passes"), lambda r: r.contestant),
    Chart("overhead", "overhead", "% over sqrt_dim", _overhead, ("head_dim", "dtype", "passes"), lambda r: r.scaling),
    Chart("scaling", "scaling", "time over ours", _ratio_of_others, _SHAPE, x="scaling"),
    Chart("decode", "decode", "GB/s", _bandwidth, ("head_dim", "dtype", "paged", "scaling"), limits=_copy),
    Chart("varlen", "varlen", "time over padded", _ratio_of_others, _PACKED),
    Chart("accuracy_by_count", "accuracy", "error, median of the scalings", _error, ("dtype", "keys"), errors=True),
    Chart(
        "accuracy_by_scaling", "accuracy", "error, median of the cases", _error, ("dtype",), x="scaling", errors=True
    ),
    Chart("accuracy_by_keys", "accuracy", "error, median of the scalings", _error, ("dtype",), x="keys", errors=True),
)


def panels_of(chart: Chart, records: list[Record]) -> list[Panel]:
    """List the panels of a chart that have something to show."""
    ceilings = {_ceiling_name(record): record for record in records if record.suite == SUITE}
    own = [record for record in records if record.suite == chart.suite and record.status == "measured"]
    found = []
    for values in dict.fromkeys(tuple(r.axes.get(axis) for axis in chart.panels) for r in own):
        members = [r for r in own if tuple(r.axes.get(axis) for axis in chart.panels) == values]
        lines: dict[str, dict[float | str, list[float]]] = {}
        for record in members:
            x, y = record.axes.get(chart.x, record.scaling), chart.y(record)
            if y is not None:
                lines.setdefault(chart.label(record), {}).setdefault(x, []).append(y)
        title = ", ".join(_named(axis, value) for axis, value in zip(chart.panels, values, strict=True))
        if lines:
            one = statistics.median if chart.errors else lambda heights: heights[-1]
            joined = {label: {x: one(ys) for x, ys in line.items()} for label, line in lines.items()}
            found.append(Panel(title, joined, chart.limits(members, ceilings)))
    return found


def _ceiling_name(record: Record) -> str:
    return f"{MATMUL} {record.axes['dtype']}" if record.contestant == MATMUL else record.contestant


def _named(axis: str, value: object) -> str:
    words = {"causal": {True: "causal", False: "full"}, "paged": {True: "paged", False: "contiguous"}}
    return words.get(axis, {}).get(value, f"head_dim {value}" if axis == "head_dim" else str(value))


def draw(chart: Chart, records: list[Record], path: Path) -> None:
    """Write a chart; every panel has the same kind of axes."""
    panels = panels_of(chart, records)
    columns = min(4, len(panels))
    rows = math.ceil(len(panels) / columns)
    figure = Figure(figsize=(4.5 * columns, 3.6 * rows), layout="constrained")
    colours = {label: f"C{n % 10}" for n, label in enumerate(dict.fromkeys(x for p in panels for x in p.lines))}
    grid = figure.subplots(rows, columns, squeeze=False)
    for axes in grid.flat[len(panels) :]:
        axes.set_axis_off()
    for panel, axes in zip(panels, grid.flat, strict=False):
        for n, (label, points) in enumerate(panel.lines.items()):
            dashes = "-" if n < 10 else ":"  # matplotlib has ten colours
            axes.plot(*_sorted(points), dashes, marker="o", markersize=3, color=colours[label], label=label)
        for label, points in panel.limits.items():
            axes.plot(*_sorted(points), "--", color="black", linewidth=1, label=label)
        axes.set(title=panel.title, ylabel=chart.ylabel, xlabel=chart.x)
        if all(isinstance(x, (int, float)) for points in panel.lines.values() for x in points):
            axes.set_xscale("log", base=2)
        else:
            axes.tick_params(axis="x", labelrotation=60)
        if chart.errors:
            axes.set_yscale("log")
        axes.grid(alpha=0.3)
        axes.legend(fontsize=6)
    members = [record for record in records if record.suite == chart.suite]
    figure.suptitle(f"{members[-1].environment}, {members[-1].date}", fontsize=7)
    figure.savefig(path, dpi=80)


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
        own = [record for record in records if record.environment.device == device]
        suffix = "" if len(devices) == 1 else "_" + re.sub(r"\W+", "-", device).strip("-").lower()
        found |= {f"{chart.name}{suffix}.png": (chart, own) for chart in CHARTS if panels_of(chart, own)}
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
