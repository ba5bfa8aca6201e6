"""The picture of README: `python -m docs.figures.recall` draws it, light and dark, from docs/data/training."""

from __future__ import annotations

from pathlib import Path

from matplotlib.figure import Figure

from tritonattn.lab.figures import dodge, foot, save, ticks_at
from tritonattn.lab.training.records import read
from tritonattn.lab.training.report import Interval

ROOT = Path(__file__).resolve().parents[2]
RUNS = ROOT / "docs/data/training/runs-recall.jsonl"
LENGTHS = (16, 64, 256, 1024, 4096)
# Mode: colour on light and on dark (after Okabe and Ito), marker, line. ssmax is dashed, over log_key_count.
MODES = {
    "key_count+gain": ("#8C6D00", "#E6C200", "v", (0, (1, 1))),
    "key_norm_mean": ("#7A5195", "#CC99CC", "^", (0, (6, 1.5, 1, 1.5))),
    "sqrt_dim": ("#000000", "#FFFFFF", "D", "-"),
    "log_key_count": ("#0072B2", "#56B4E9", "s", "-"),
    "ssmax": ("#D55E00", "#FF8A3D", "o", (0, (3, 3))),
}
THEMES = {"light": ("#FFFFFF", "#24292F", "#EAEEF2"), "dark": ("#0D1117", "#E6EDF3", "#21262D")}


def recalls() -> dict[str, dict[int, Interval]]:
    """Share of right values by mode and number of pairs, over the seeds."""
    runs = read(RUNS)
    return {
        mode: {n: Interval.of([run.metrics[f"accuracy_{n}"] for run in runs if run.mode == mode]) for n in LENGTHS}
        for mode in MODES
    }


def source() -> str:
    run = read(RUNS)[0]
    return f"Measured: {run.environment}, {run.date}, `{run.command}`"


def draw(theme: str) -> Figure:
    paper, ink, shade = THEMES[theme]
    figure = Figure(figsize=(8, 4.2), layout="constrained", facecolor=paper)
    axes = figure.subplots()
    axes.set_facecolor(paper)
    axes.axvspan(14, 74, color=shade, zorder=0)
    axes.text(32, 0.5, "trained lengths", color=ink, ha="center", fontsize=9)
    axes.plot((13, LENGTHS[-1]), (1 / 16, 1 / 16), color=ink, linewidth=0.8, linestyle=":")
    axes.text(100, 1 / 16 + 0.015, "chance", color=ink, fontsize=9)
    labels = {}
    for index, (mode, by_length) in enumerate(recalls().items()):
        (*colours, marker, line) = MODES[mode]
        colour = colours[theme == "dark"]
        means, halves = zip(*((one.mean, one.half) for one in by_length.values()), strict=True)
        look = {"color": colour, "marker": marker, "markersize": 5, "capsize": 3, "linewidth": 1.6, "linestyle": line}
        aside = 2 ** dodge(index, len(MODES), 0.3)
        axes.errorbar([n * aside for n in LENGTHS], means, halves, **look)
        labels[means[-1]] = (f"{mode}  {means[-1]:.0%}", colour)
    height = 0.0
    for mean in sorted(labels):
        text, colour = labels[mean]
        height = max(mean, height + 0.055)
        axes.text(5300, height, text, color=colour, va="center", fontsize=10)
    axes.set(xscale="log", ylim=(0, 1.03), xlim=(13, 19000), xlabel="keys in the table that is searched")
    axes.set_ylabel("share of values recalled")
    ticks_at(axes.xaxis, LENGTHS)
    axes.tick_params(colors=ink)
    axes.xaxis.label.set_color(ink)
    axes.yaxis.label.set_color(ink)
    for side, spine in axes.spines.items():
        spine.set_visible(side in ("left", "bottom"))
        spine.set_color(ink)
    title = "Recall beyond the trained number of keys: one layer, mean of 5 seeds, 95% intervals"
    figure.suptitle(title, color=ink, fontsize=11)
    foot(figure, source(), color=ink)
    return figure


if __name__ == "__main__":
    for name in THEMES:
        file = Path(__file__).parent / f"recall-{name}.png"
        save(draw(name), file, dpi=144)
        print(file.relative_to(ROOT))
