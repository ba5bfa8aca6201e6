"""Pictures of training runs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from statistics import fmean
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from tritonattn.lab.figures import dodge, foot, plain_numbers, staggered, styles, ticks_at, values_at_right

from .records import Run
from .report import Interval, by_mode
from .tasks import TASKS

Looks = dict[str, dict[str, Any]]
Modes = dict[str, list[Run]]


def figure_of(runs: Sequence[Run]) -> Figure:
    """Draw one task's runs: held-out loss, gradient norms and entropy over steps, gradients by layer, and measures."""
    modes = {mode: [run for run in group if run.status == "trained"] for mode, group in by_mode(runs).items()}
    modes = {mode: group for mode, group in modes.items() if group}
    looks, base = styles(modes), next(iter(modes))
    base_loss = {run.seed: run.held_out_loss for run in modes[base]}
    figure = Figure(figsize=(10.5, 7.6), layout="constrained")
    loss, gradients, entropy, moved, layers, final = figure.subplots(2, 3).flat
    _curves(loss, modes, looks, lambda run: run.held_out_loss)
    _curves(moved, modes, looks, lambda run: _less(run.held_out_loss, base_loss.get(run.seed)))
    _curves(gradients, modes, looks, lambda run: _mean_over_layers(_of_qk(run)))
    _curves(entropy, modes, looks, lambda run: _mean_over_layers(run.entropy))
    _by_layer(layers, modes, looks)
    _measures(final, modes, looks)
    loss.set(title="Held-out loss", ylabel="nats", yscale="log")
    moved.set(title=f"Held-out loss less {base}'s, same seed", ylabel="nats")
    moved.set_yscale("symlog", linthresh=0.1)
    gradients.set(title="Gradients of W_q and W_k", ylabel="norm", yscale="log")
    entropy.set(title="Entropy of attention: 1 is uniform", ylabel="entropy / ln n", ylim=(0, 1.05))
    layers.set(title="Gradients of W_q and W_k by layer", ylabel="norm, mean over steps", yscale="log")
    for axes in (loss, gradients, moved, layers):
        plain_numbers(axes.yaxis)
    for axes in figure.axes:
        axes.title.set_fontsize(10)
    first, seeds = runs[0], len({run.seed for run in runs})
    figure.suptitle(_message(modes), fontsize=12)
    about = f'{first.recipe}; means of {seeds} seeds; bands, bars and "better" are of 95% intervals'
    foot(figure, f"Measured: {about}. {first.environment}, {first.date}, `{first.command}`", looks)
    return figure


def _message(modes: Modes) -> str:
    """The task's measure of the first mode, and of those whose difference from it excludes 0, over the same seeds."""
    base, *others = modes
    first = modes[base][0]
    task = TASKS[first.task]
    measured = {mode: {run.seed: run.metrics[task.metric] for run in runs} for mode, runs in modes.items()}
    better = []
    for mode in others:
        pairs = [(value, measured[base][seed]) for seed, value in measured[mode].items() if seed in measured[base]]
        moved = Interval.of([value - other for value, other in pairs]) if pairs else None
        if moved and moved.excludes_zero and (moved.mean > 0) is task.higher_is_better:
            better.append(f"{mode} {fmean(measured[mode].values()):.3f}")
    found = ", ".join(better) or "no mode"
    metric = task.metric.replace("_", " at ")
    return f"{first.subject}: {metric} {fmean(measured[base].values()):.3f} with {base}; better: {found}"


def _curves(axes: Axes, modes: Modes, looks: Looks, curve: Callable[[Run], Sequence[float]]) -> None:
    """Draw a mode's mean over its seeds as a line over steps, with a band; an empty curve is left out."""
    for index, (mode, runs) in enumerate(modes.items()):
        columns = list(zip(*filter(None, map(curve, runs)), strict=True))
        intervals = [Interval.of(column) for column in columns]
        steps = runs[0].steps[: len(columns)]
        marks = staggered(index, len(modes), len(columns))
        axes.plot(steps, [one.mean for one in intervals], **looks[mode], markevery=marks)
        if len(runs) > 1:
            # An interval of few positive values can reach below 0, which a logarithmic axis cannot show.
            lower = [max(one.mean - one.half, min(column)) for one, column in zip(intervals, columns, strict=True)]
            upper = [min(one.mean + one.half, max(column)) for one, column in zip(intervals, columns, strict=True)]
            axes.fill_between(steps, lower, upper, color=looks[mode]["color"], alpha=0.07, linewidth=0)
    axes.set_xlabel("step")


def _less(values: Sequence[float], base: Sequence[float] | None) -> list[float]:
    return [] if base is None else [one - other for one, other in zip(values, base, strict=True)]


def _by_layer(axes: Axes, modes: Modes, looks: Looks) -> None:
    names = list(_of_qk(next(iter(modes.values()))[0]))
    for index, (mode, runs) in enumerate(modes.items()):
        means = [fmean(fmean(run.gradients[name]) for run in runs) for name in names]
        aside = dodge(index, len(modes), 0.3)
        axes.plot([x + aside for x in range(len(names))], means, **looks[mode])
    labels = [name.removesuffix(" qk").replace(".attention", "\nself").replace(".cross", "\ncross") for name in names]
    axes.set_xticks(range(len(names)), labels)
    axes.set_xlim(-0.5, len(names) - 0.5)


def _measures(axes: Axes, modes: Modes, looks: Looks) -> None:
    """Draw a measure for several lengths as a line over them, one measure as a point per mode with its value."""
    run = next(iter(modes.values()))[0]
    metric = TASKS[run.task].metric
    stem = metric.rsplit("_", 1)[0] + "_"
    lengths = {name: int(name.removeprefix(stem)) for name in run.metrics if name.startswith(stem)}
    if lengths:
        for index, (mode, runs) in enumerate(modes.items()):
            found = [Interval.of([run.metrics[name] for run in runs]) for name in lengths]
            xs = [n * 2 ** dodge(index, len(modes), 0.4) for n in lengths.values()]
            look = {**looks[mode], "capsize": 2, "elinewidth": 1}
            axes.errorbar(xs, [one.mean for one in found], [one.half for one in found], **look)
        axes.set(title=f"{stem.rstrip('_').capitalize()} by length in testing", xscale="log", xlabel="length")
        ticks_at(axes.xaxis, list(lengths.values()))
        return
    found = [Interval.of([run.metrics[metric] for run in runs]) for runs in modes.values()]
    for row, (mode, one) in enumerate(zip(modes, found, strict=True)):
        axes.errorbar(one.mean, row, xerr=one.half, **looks[mode], capsize=3)
    values_at_right(axes, [f"{one.mean:.3f}" for one in found])
    axes.set_yticks(range(len(modes)), list(modes), fontsize=8)
    axes.invert_yaxis()
    axes.set(title="On held-out data, at the end", xlabel=metric)


def _of_qk(run: Run) -> dict[str, list[float]]:
    return {name: norms for name, norms in run.gradients.items() if name.endswith(" qk")}


def _mean_over_layers(lists: dict[str, list[float]]) -> list[float]:
    return [fmean(column) for column in zip(*lists.values(), strict=True)]
