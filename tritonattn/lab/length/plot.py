"""The picture of a length study."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from ...core.provenance import Environment
from ..figures import COLOURS, foot, plain_numbers, save, staggered, styles

_LINEAR = 0.01  # differences up to here stand on a linear part of their axis


def draw(record: dict[str, Any], file: Path) -> None:
    """Draw the loss by position, and its difference from the baseline's, from `Study.record()`."""
    figure = Figure(figsize=(10.5, 5.6), layout="constrained")
    loss, moved = figure.subplots(1, 2, sharex=True)
    bins, losses, alone = record["bins"], record["loss"], record["second_part_alone"]
    middles = [(lo + hi) / 2 for lo, hi in bins]
    base = next(iter(losses.values()))
    looks = styles(losses)
    for index, (name, values) in enumerate(losses.items()):
        marks = staggered(index, len(losses), len(middles))
        loss.plot(middles, values, **looks[name], markevery=marks)
        moved.plot(middles, _less(values, base), **looks[name], markevery=marks)
    without = f"{next(iter(losses))}, nothing before {alone['start']}"
    looks[without] = {"color": COLOURS[-1], "linestyle": ":", "marker": "x", "markersize": 4, "linewidth": 1.3}
    later = [index for index, (lo, _) in enumerate(bins) if lo > alone["start"]]
    xs = [middles[index] for index in later]
    loss.plot(xs, alone["by_bin"], **looks[without])
    moved.plot(xs, _less(alone["by_bin"], [base[index] for index in later]), **looks[without])
    for axes in (loss, moved):
        axes.axvline(record["context"], color="grey", linewidth=0.8)
        axes.set_xlabel(f"position (grey: the trained context, {record['context']:,})")
        axes.xaxis.set_major_formatter("{x:,.0f}")
    loss.set_ylabel("loss per token (nats)")
    moved.set_ylabel(f"loss less {next(iter(losses))}'s (nats)")
    moved.set_yscale("symlog", linthresh=_LINEAR)
    moved.set_ylim(bottom=min(-1.5 * _LINEAR, 1.5 * moved.dataLim.y0))
    plain_numbers(moved.yaxis)
    figure.suptitle(f"{record['model']}: loss by position, {record['tokens']:,} tokens of {record['text']}")
    foot(figure, f"Measured: {Environment(**record['environment'])}, `{record['command']}`", looks, columns=4)
    save(figure, file)


def _less(values: list[float], base: list[float]) -> list[float]:
    return [one - other for one, other in zip(values, base, strict=True)]
