"""Print the records of `python -m perf sweep` as tables."""

from __future__ import annotations

import argparse
import math
import re
import statistics
import sys
from collections.abc import Callable, Iterable
from itertools import groupby
from pathlib import Path

from tabulate import tabulate

from tritonattn.cli.options import check_file

from ..cases.records import Record, read_all

# Axes that get a column; the others follow from these.
_SHOWN = (
    "form",
    "batch",
    "heads",
    "kv_heads",
    "length",
    "sequences",
    "head_dim",
    "dtype",
    "causal",
    "passes",
    "paged",
    "size",
    "bytes",
)
_SHORT = {"forward+backward": "fwd+bwd", "forward": "fwd", "backward": "bwd", "True": "yes", "False": ""}


def tables(records: Iterable[Record]) -> str:
    """Write Markdown: a heading for every suite and environment, its table, and who was skipped and why."""
    ordered = sorted(records, key=lambda record: (record.suite, str(record.environment)))
    parts = []
    for (suite, environment), group in groupby(ordered, key=lambda record: (record.suite, str(record.environment))):
        of_suite = list(group)
        dates = ", ".join(sorted({record.date for record in of_suite}))
        parts.append(f"## {suite}\n\n{of_suite[0].origin}: {environment}, {dates}{_card(of_suite)}.")
        table = _accuracy_table if suite == "accuracy" else _times_table
        parts += [part for part in (table(of_suite), _absent(of_suite)) if part]
    return "\n\n".join(parts)


def _times_table(records: list[Record]) -> str:
    """One row a contestant and case."""
    shown = [name for name in _SHOWN if any(name in record.axes for record in records)]
    columns: dict[str, Callable[[Record], str]] = {
        "ms": lambda r: _number(r.median_ms),
        "quartiles": lambda r: "" if r.median_ms is None else f"{_number(r.lower_ms)} - {_number(r.upper_ms)}",
        "ms, modelled": lambda r: _number(r.modelled_ms),
        "TFLOP/s": lambda r: _number(r.tflops),
        "GB/s": lambda r: _number(r.gbps),
        "time ratio": lambda r: "" if r.ratio is None else f"{r.ratio:.3f}",
        "us more": lambda r: "" if r.ratio is None else f"{1000 * r.median_ms * (1 - 1 / r.ratio):.0f}",
        "error/bound": lambda r: "" if not r.bound else "NaN" if r.error is None else f"{r.error / r.bound:.2f}",
    }
    if not any(record.modelled_ms for record in records):
        del columns["ms, modelled"]
    rows = []
    for record in records:
        if record.status == "skipped":
            continue
        values = [_text(record.axes.get(name, "")) for name in shown]
        figures = [column(record) for column in columns.values()]
        rows.append([*values, record.contestant, *figures, "" if record.status == "measured" else record.status])
    headers = [*shown, "contestant", *columns, ""]
    return tabulate(rows, headers, "github", disable_numparse=True) + _baselines(records)


def _baselines(records: list[Record]) -> str:
    compared = [record for record in records if record.baseline and record.baseline != record.contestant]
    names = {record.baseline for record in compared}
    if not compared:
        return ""
    first = compared[0]
    whose = first.baseline if len(names) == 1 else f"{first.baseline.removesuffix(first.scaling)}with the same scaling"
    return f"\n\nTime ratios, medians over rounds, and microseconds more are to {whose}."


def _accuracy_table(records: list[Record]) -> str:
    """Tabulate errors of ours and of the recipe by distribution of keys, by their number, and by scaling."""
    parts = ["Errors of the output over its largest exact value: median, and largest, of the cases in a row."]
    records = [record for record in records if record.status != "failed"]
    contestants = list(dict.fromkeys(implementation(record) for record in records))
    for name in ("keys", "number of keys", "scaling"):
        axis = {"number of keys": "length"}.get(name, name)
        rows = []
        for dtype, value in dict.fromkeys((r.axes["dtype"], r.axes.get(axis, r.scaling)) for r in records):
            alike = [r for r in records if (r.axes["dtype"], r.axes.get(axis, r.scaling)) == (dtype, value)]
            errors = [[_size(r.error) for r in alike if implementation(r) == who] for who in contestants]
            rows.append([dtype, value, *(f"{statistics.median(e):.1e}, {max(e):.1e}" if e else "" for e in errors)])
        parts.append(tabulate(rows, ["dtype", name, *contestants], "github", disable_numparse=True))
    return "\n\n".join(parts)


def _size(error: float | None) -> float:
    return math.inf if error is None or math.isnan(error) else error


def implementation(record: Record) -> str:
    """Return the contestant's name without its scaling."""
    return record.contestant.removesuffix(f" {record.scaling}")


def _absent(records: list[Record]) -> str:
    """List the contestants that were skipped or failed, with counts and reasons, and each wrong or inexact result."""
    counts: dict[tuple[str, str, str], int] = {}
    for record in records:
        if record.status in ("skipped", "failed"):
            key = implementation(record), record.status, record.reason
            counts[key] = counts.get(key, 0) + 1
    lines = [f"- {name}: {status} in {n} cases: {reason}" for (name, status, reason), n in counts.items()]
    return "\n".join([*lines, *(_not_timed(r) for r in records if r.status in ("wrong", "inexact"))])


def _not_timed(record: Record) -> str:
    return f"- {record.contestant}, {record.case}: {record.status}, so not timed: {record.reason}"


def _card(records: list[Record]) -> str:
    """Write the range of clocks and temperatures over the cases."""
    names = dict.fromkeys(name for record in records for name in record.card)
    parts = []
    for name in names:
        values = list(dict.fromkeys(record.card[name] for record in records if name in record.card))
        ends = min(values, key=_leading_number), max(values, key=_leading_number)
        parts.append(f"{name} {values[0]}" if len(values) == 1 else f"{name} {ends[0]} .. {ends[1]}")
    return f"; {', '.join(parts)}" if parts else ""


def _leading_number(text: str) -> float:
    """Parse "1980 MHz"; "[N/A]" is 0."""
    number = re.match(r"[\d.]+", text)
    return float(number[0]) if number else 0.0


def _text(value: object) -> str:
    return _SHORT.get(str(value), str(value))


def _number(figure: float | None) -> str:
    """Format with three digits."""
    if figure is None:
        return ""
    return f"{figure:.0f}" if figure >= 100 else f"{figure:.3g}"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("files", nargs="+", type=Path, help="written by `python -m perf sweep --json`")
    parser.add_argument("--out", type=Path, metavar="FILE", help="also write them to this file")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> None:
    """Print the tables, and write them to --out."""
    check_file("--out", arguments.out)
    text = tables(read_all(arguments.files))
    if not text:
        sys.exit(f"report: no records in {', '.join(map(str, arguments.files))}")
    print(text)
    if arguments.out:
        arguments.out.write_text(text + "\n", encoding="utf-8")
