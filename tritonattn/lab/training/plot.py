"""Pictures of training runs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from .interval import Interval
from .records import Run
from .report import by_mode
from .tasks import TASKS


def draw(runs: Sequence[Run], file: Path) -> None:
    """Draw one task's runs: held-out loss, gradient norms and entropy over steps, gradients by layer, and measures."""
    figure = Figure(figsize=(12, 7), layout="constrained")
    panels = figure.subplots(2, 3).flat
    modes = {mode: [run for run in members if run.status == "trained"] for mode, members in by_mode(runs).items()}
    modes = {mode: members for mode, members in modes.items() if members}
    colours = {mode: f"C{index}" for index, mode in enumerate(modes)}
    loss, gradients, entropy, layers, final, legend = panels
    for mode, members in modes.items():
        colour = colours[mode]
        _band(loss, members, lambda run: run.held_out_loss, colour)
        _band(gradients, members, lambda run: _mean_over_layers(run.gradients, " qk"), colour)
        _band(entropy, members, lambda run: _mean_over_layers(run.entropy), colour)
        _by_layer(layers, members, colour)
        legend.plot([], [], color=colour, label=mode)
    _measures(final, modes, colours)
    loss.set(xlabel="step", ylabel="held-out loss (nats)")
    gradients.set(xlabel="step", ylabel="gradient norm of W_q, W_k", yscale="log")
    entropy.set(xlabel="step", ylabel="entropy / ln n", ylim=(0, 1.05))
    layers.set(ylabel="gradient norm of W_q, W_k\nmean over steps", yscale="log")
    legend.axis("off")
    legend.legend(loc="center", fontsize="large")
    seeds = len({run.seed for run in runs})
    figure.suptitle(f"{runs[0].task}: {runs[0].recipe}; mean of {seeds} seeds, bands and bars 95% intervals")
    figure.savefig(file, dpi=72)


def _band(axes: Axes, runs: Sequence[Run], curve: Callable[[Run], Sequence[float]], colour: str) -> None:
    columns = list(zip(*(curve(run) for run in runs), strict=True))
    intervals = [Interval.of(column) for column in columns]
    means = [one.mean for one in intervals]
    axes.plot(runs[0].steps, means, color=colour, linewidth=1.2)
    if len(runs) > 1:
        # An interval of few positive values can reach below 0, which a logarithmic axis cannot show.
        lower = [max(one.mean - one.half, min(column)) for one, column in zip(intervals, columns, strict=True)]
        upper = [min(one.mean + one.half, max(column)) for one, column in zip(intervals, columns, strict=True)]
        axes.fill_between(runs[0].steps, lower, upper, color=colour, alpha=0.15, linewidth=0)


def _by_layer(axes: Axes, runs: Sequence[Run], colour: str) -> None:
    names = [name for name in runs[0].gradients if name.endswith(" qk")]
    means = [sum(sum(run.gradients[name]) / len(run.gradients[name]) for run in runs) / len(runs) for name in names]
    axes.plot(range(len(names)), means, "o-", color=colour)
    labels = [name.removesuffix(" qk").replace(".attention", "\nself").replace(".cross", "\ncross") for name in names]
    axes.set_xticks(range(len(names)), labels, fontsize="small")


def _measures(axes: Axes, modes: dict[str, list[Run]], colours: dict[str, str]) -> None:
    """Draw a measure for several lengths as a line over them, one measure as a bar a mode."""
    runs = next(iter(modes.values()))
    task = TASKS[runs[0].task]
    stem = task.metric.rsplit("_", 1)[0] + "_"
    lengths = {name: int(name.removeprefix(stem)) for name in runs[0].metrics if name.startswith(stem)}
    for row, (mode, members) in enumerate(modes.items()):
        if lengths:
            found = [Interval.of([run.metrics[name] for run in members]) for name in lengths]
            axes.errorbar(
                list(lengths.values()),
                [one.mean for one in found],
                [one.half for one in found],
                color=colours[mode],
                capsize=2,
                linewidth=1.2,
            )
        else:
            one = Interval.of([run.metrics[task.metric] for run in members])
            axes.barh(row, one.mean, xerr=one.half, color=colours[mode], capsize=2)
    if lengths:
        axes.set(xscale="log", xlabel="length in testing", ylabel=stem.rstrip("_"))
        axes.set_xticks(list(lengths.values()), [str(n) for n in lengths.values()])
        axes.minorticks_off()
    else:
        axes.set_yticks(range(len(modes)), list(modes), fontsize="small")
        axes.invert_yaxis()
        axes.set_xlabel(task.metric)


def _mean_over_layers(lists: dict[str, list[float]], ending: str = "") -> list[float]:
    chosen = [values for name, values in lists.items() if name.endswith(ending)]
    return [sum(column) / len(column) for column in zip(*chosen, strict=True)]
