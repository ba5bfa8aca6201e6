"""The picture of README: `python -m docs.figures.recall` draws it from docs/data/qk-norm."""

from __future__ import annotations

from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

from perf.studies.train_compare.records import read
from perf.studies.train_compare.report import Interval
from tritonattn.lab.figures import COLOURS, foot, ticks_at

from .themes import save_themes

ROOT = Path(__file__).resolve().parents[2]
RUNS = ROOT / "docs/data/qk-norm/runs-recall.jsonl"
LENGTHS = (64, 256, 1024, 4096)
# Mode: colour, marker, line. ssmax is dashed, over log_key_count.
MODES = {
    "sqrt_dim": (COLOURS[1], "D", "-"),
    "log_key_count": (COLOURS[2], "s", "-"),
    "ssmax": (COLOURS[3], "o", (0, (3, 3))),
}
WITHOUT = COLOURS[7]  # the grey of lines without QK-norm


def recalls(*, qk_norm: bool) -> dict[str, dict[int, Interval]]:
    """Share of right values by mode and number of pairs, over the seeds, with heads of 16."""
    runs = [run for run in read(RUNS) if run.qk_norm == qk_norm and run.head_dim is None]
    return {
        mode: {n: Interval.of([run.metrics[f"accuracy_{n}"] for run in runs if run.mode == mode]) for n in LENGTHS}
        for mode in MODES
    }


def source() -> str:
    run = read(RUNS)[0]
    task = "One layer of attention, 4 heads of 16, finds a key's value; mean of 5 seeds, 95% intervals; chance 6%. "
    return f"{task}Measured: {run.environment}, {run.date}; commands and controls: docs/training.md"


def draw() -> Figure:
    figure = Figure(figsize=(8, 4.4), layout="constrained")
    axes = figure.subplots()
    axes.axvline(64, color=WITHOUT, linewidth=0.8)
    axes.annotate("trained on\n16 to 64 keys", (64, 0.03), (5, 0), textcoords="offset points", fontsize=9)
    ends = []
    for mode, by_length in recalls(qk_norm=False).items():
        means = [one.mean for one in by_length.values()]
        axes.plot(LENGTHS, means, color=WITHOUT, linewidth=1, linestyle=MODES[mode][-1])
        ends.append((means[-1], f"{mode}  {means[-1]:.0%}", WITHOUT, 9))
    for mode, by_length in recalls(qk_norm=True).items():
        colour, marker, line = MODES[mode]
        means, halves = zip(*((one.mean, one.half) for one in by_length.values()), strict=True)
        look = {"color": colour, "marker": marker, "markersize": 6, "capsize": 3, "linewidth": 2.4, "linestyle": line}
        axes.errorbar(LENGTHS, means, halves, **look)
        ends.append((means[-1], f"{mode}  {means[-1]:.1%}", colour, 11))
    label_ends(axes, ends)
    axes.set(xscale="log", ylim=(0, 1.04), xlim=(58, 4700), xlabel="keys in the table that is searched")
    axes.set_ylabel("values recalled")
    axes.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    ticks_at(axes.xaxis, LENGTHS)
    axes.spines[["top", "right"]].set_visible(False)
    figure.suptitle("Same task, same seeds; only the factor differs", fontsize=13)
    axes.set_title("colour: q and k normalised (QK-norm); grey: without", fontsize=10)
    foot(figure, source())
    return figure


def label_ends(axes: Axes, ends: list[tuple[float, str, str, int]]) -> None:
    """Write texts (height, text, colour, size) at the right of the axes, from the top down, apart from one another."""
    height = 1.1
    for mean, text, colour, size in sorted(ends, reverse=True):
        height = min(mean, height - 0.07)
        where = {"xycoords": ("axes fraction", "data"), "textcoords": "offset points", "annotation_clip": False}
        axes.annotate(text, (1.0, height), (4, 0), color=colour, va="center", fontsize=size, **where)


if __name__ == "__main__":
    print(*save_themes(draw(), Path(__file__).with_suffix(".png"), dpi=144), sep="\n")
