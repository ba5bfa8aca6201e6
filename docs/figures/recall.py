"""The picture of README: `python -m docs.figures.recall` draws it, light and dark, from docs/data/qk-norm."""

from __future__ import annotations

from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

from tritonattn.lab.figures import foot, save, ticks_at
from tritonattn.lab.training.records import read
from tritonattn.lab.training.report import Interval

ROOT = Path(__file__).resolve().parents[2]
RUNS = ROOT / "docs/data/qk-norm/runs-recall.jsonl"
LENGTHS = (64, 256, 1024, 4096)
# Mode: colour on light and on dark (after Okabe and Ito), marker, line. ssmax is dashed, over log_key_count.
MODES = {
    "sqrt_dim": ("#D55E00", "#FF8A3D", "D", "-"),
    "log_key_count": ("#0072B2", "#56B4E9", "s", "-"),
    "ssmax": ("#009E73", "#4CD9A8", "o", (0, (3, 3))),
}
THEMES = {"light": ("#FFFFFF", "#24292F", "#8C959F"), "dark": ("#0D1117", "#E6EDF3", "#7D8590")}  # paper, ink, grey


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


def draw(theme: str) -> Figure:
    paper, ink, grey = THEMES[theme]
    figure = Figure(figsize=(8, 4.4), layout="constrained", facecolor=paper)
    axes = figure.subplots()
    axes.set_facecolor(paper)
    axes.axvline(64, color=grey, linewidth=0.8)
    axes.annotate("trained on\n16 to 64 keys", (64, 0.03), (5, 0), textcoords="offset points", color=ink, fontsize=9)
    ends = []
    for mode, by_length in recalls(qk_norm=False).items():
        means = [one.mean for one in by_length.values()]
        axes.plot(LENGTHS, means, color=grey, linewidth=1, linestyle=MODES[mode][-1])
        ends.append((means[-1], f"{mode}  {means[-1]:.0%}", grey, 9))
    for mode, by_length in recalls(qk_norm=True).items():
        (*colours, marker, line) = MODES[mode]
        colour = colours[theme == "dark"]
        means, halves = zip(*((one.mean, one.half) for one in by_length.values()), strict=True)
        look = {"color": colour, "marker": marker, "markersize": 6, "capsize": 3, "linewidth": 2.4, "linestyle": line}
        axes.errorbar(LENGTHS, means, halves, **look)
        ends.append((means[-1], f"{mode}  {means[-1]:.1%}", colour, 11))
    beside(axes, ends)
    axes.set(xscale="log", ylim=(0, 1.04), xlim=(58, 4700), xlabel="keys in the table that is searched")
    axes.set_ylabel("values recalled")
    axes.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    ticks_at(axes.xaxis, LENGTHS)
    axes.tick_params(colors=ink)
    axes.xaxis.label.set_color(ink)
    axes.yaxis.label.set_color(ink)
    for side, spine in axes.spines.items():
        spine.set_visible(side in ("left", "bottom"))
        spine.set_color(ink)
    figure.suptitle("Same task, same seeds; only the factor differs", color=ink, fontsize=13)
    axes.set_title("colour: q and k normalised (QK-norm); grey: without", color=ink, fontsize=10)
    foot(figure, source(), color=ink)
    return figure


def beside(axes: Axes, ends: list[tuple[float, str, str, int]]) -> None:
    """Write texts (height, text, colour, size) at the right of the axes, from the top down, apart from one another."""
    height = 1.1
    for mean, text, colour, size in sorted(ends, reverse=True):
        height = min(mean, height - 0.07)
        where = {"xycoords": ("axes fraction", "data"), "textcoords": "offset points", "annotation_clip": False}
        axes.annotate(text, (1.0, height), (4, 0), color=colour, va="center", fontsize=size, **where)


if __name__ == "__main__":
    for name in THEMES:
        file = Path(__file__).parent / f"recall-{name}.png"
        save(draw(name), file, dpi=144)
        print(file.relative_to(ROOT))
