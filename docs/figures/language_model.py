"""The picture of language-model.md: `python -m docs.figures.language_model` draws it from the study's record."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from statistics import fmean

from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

from perf.studies.language_model.cells import FOUR_TIMES, LEDGER, LOG, SQRT, SSMAX, TWICE
from perf.studies.language_model.model import Factor, Shape
from perf.studies.language_model.records import Run, read
from perf.studies.language_model.tasks import MULTIPLES, TASKS
from perf.studies.language_model.training import Outcome
from tritonattn.lab.figures import COLOURS, foot, ticks_at

from .recall import label_ends
from .themes import save_themes

# By factor in training and change at test: label, colour, marker, line.
LINES: dict[tuple[Factor, str], tuple[str, str, str, str | tuple]] = {
    (SQRT, ""): ("sqrt_dim", COLOURS[1], "D", "-"),
    (LOG, ""): ("log_key_count", COLOURS[2], "s", "-"),
    (SSMAX, ""): ("SSMax", COLOURS[3], "o", (0, (3, 3))),
    (SQRT, "log n at test"): ("sqrt_dim, ln n at test", COLOURS[5], "^", (0, (1, 1))),
    (SQRT, "four times at test"): ("4 times sqrt_dim at test", COLOURS[7], "X", (0, (1, 1))),
    (FOUR_TIMES, ""): ("4 times sqrt_dim", COLOURS[7], "P", "-"),
    (TWICE, ""): ("2 times sqrt_dim", COLOURS[7], "v", "-"),
}


def drawn() -> list[Run]:
    """The runs of the ledger whose models differ in the factor alone."""
    runs = [run for run in read() if run.cell.task == "ledger" and run.cell.recipe == LEDGER]
    return [run for run in runs if replace(run.cell.shape, factor=SQRT) == Shape("wn")]


def recalls(runs: list[Run], factor: Factor, swap: str) -> dict[int, list[float]]:
    """Accuracies of the seeds by multiple; ln n at test changes nothing at the trained length."""
    found = [run.found for run in runs if run.cell.shape.factor == factor]
    return {multiple: [_accuracy(one, swap, str(multiple)) for one in found] for multiple in MULTIPLES}


def _accuracy(found: Outcome, swap: str, multiple: str) -> float:
    return found.results[swap].get(multiple, found.results[""][multiple])["accuracy"]


def draw() -> Figure:
    runs = drawn()
    figure = Figure(figsize=(8, 4.4), layout="constrained")
    axes, ends = figure.subplots(), []
    lengths = [multiple * TASKS["ledger"].length for multiple in MULTIPLES]
    for (factor, swap), (label, colour, marker, line) in LINES.items():
        by_multiple = [*recalls(runs, factor, swap).values()]
        means = [fmean(values) for values in by_multiple]
        thin = colour == COLOURS[7]
        look = {"color": colour, "marker": marker, "markersize": 5, "linewidth": 1 if thin else 2.2, "linestyle": line}
        axes.plot(lengths, means, **look)
        axes.fill_between(lengths, [*map(min, by_multiple)], [*map(max, by_multiple)], color=colour, alpha=0.15, lw=0)
        ends.append((means[-1], f"{label}  {means[-1]:.0%}", colour, 9 if thin else 11))
    axes.set(xscale="log", ylim=(0, 1.04), xlim=(58, 2350), xlabel="tokens of the sequence; trained on 64")
    label_ends(axes, ends)
    axes.set_ylabel("values recalled")
    axes.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    ticks_at(axes.xaxis, lengths)
    axes.spines[["top", "right"]].set_visible(False)
    figure.suptitle("A small GPT that keeps a ledger: only the factor differs", fontsize=13)
    axes.set_title("a rotary layer with a window, then a layer over all keys without positions; QK-norm", fontsize=10)
    seeds = len({run.cell.seed for run in runs})
    kept = runs[0]
    foot(
        figure,
        f"Mean of {seeds} seeds, bands from the least to the greatest; chance 3%. "
        f"Measured: {kept.environment}, {kept.date}; controls: docs/language-model.md",
    )
    return figure


if __name__ == "__main__":
    print(*save_themes(draw(), Path(__file__).with_name("language-model.png"), dpi=144), sep="\n")
