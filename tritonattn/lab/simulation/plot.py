"""Pictures of a simulation."""

from __future__ import annotations

import math
import textwrap
from pathlib import Path
from statistics import fmean

import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.mlab import GaussianKDE
from torch import Tensor

from ...analysis.diagnosis import ONE_HOT, UNIFORM
from ..figures import COLOURS, foot, save, staggered, style, ticks_at
from .measures import Point
from .report import BY_COUNT, TITLES, Findings

_FLOOR = 1e-20  # the lowest value on a logarithmic axis
_LINEAR = ("relative_entropy",)
_TOGETHER = 1.1  # lines that differ by less at every point are drawn as one
_FADED = 0.1  # a largest probability that has faded
_MOVED = 0.04  # a change of entropy / ln n to speak of
_OTHERS = "#D0D0D0"
_ON_LIGHT, _ON_DARK = "#111111", "#EEEEEE"  # text in cells, whose colours no theme changes


def draw_all(findings: Findings, folder: Path) -> list[Path]:
    """Write every picture that has figures, and return the paths."""
    written = {folder / f"{name}.png": figure for name, figure in figures_of(findings).items()}
    for file, figure in written.items():
        save(figure, file)
    return list(written)


def figures_of(findings: Findings) -> dict[str, Figure]:
    """Draw every picture that has figures, by its name."""
    numbers = dict.fromkeys(part.panel.figure for part in findings.components)
    figures = {f"paper_figure_{number}": _paper(number, findings) for number in numbers}
    if findings.sweep:
        figures["by_count"] = _lines(findings, "count", "keys")
        figures["by_dim"] = _lines(findings, "dim", "head dim")
        figures["by_keys"] = _by_keys(findings)
        figures["two_ways"] = two_ways(findings)
    if findings.verdict:
        figures["verdict"] = _verdict(findings)
    return figures


def density(values: Tensor, points: int = 512) -> tuple[Tensor, Tensor]:
    """Estimate a kernel density over the range of the values, with the bandwidth of R's density(): nrd0."""
    spread = values.std()
    low, high = values.quantile(torch.tensor([0.25, 0.75], dtype=values.dtype))
    narrower = torch.minimum(spread, (high - low) / 1.34)
    bandwidth = 0.9 * (narrower if narrower > 0 else spread) * len(values) ** -0.2
    x = torch.linspace(float(values.min()), float(values.max()), points, dtype=values.dtype)
    if bandwidth == 0:
        return x, torch.zeros_like(x)
    return x, torch.from_numpy(GaussianKDE(values.numpy(), float(bandwidth / spread))(x.numpy()))


def _paper(number: int, findings: Findings) -> Figure:
    parts = [part for part in findings.components if part.panel.figure == number]
    figure = Figure(figsize=(3.5 * len(parts), 3.8), layout="constrained")
    looks = {
        "key 1 over 500 queries": {"color": COLOURS[2], "linestyle": "-"},
        "column 1 as the published package orders it": {"color": COLOURS[1], "linestyle": "--"},
    }
    simulated, published = looks.values()
    for axes, part in zip(figure.subplots(1, len(parts), squeeze=False)[0], parts, strict=True):
        axes.plot(*density(part.values), **simulated)
        axes.plot(*density(part.as_published), **published)
        axes.plot(part.values, torch.zeros_like(part.values), "|", color=simulated["color"], alpha=0.35, markersize=12)
        label = "value" if part.panel.mode is None else "probability"
        axes.set(xlabel=label, ylabel="density")
        axes.set_title(textwrap.fill(f"({part.panel.letter}) {part.panel.title}", 36), fontsize=9)
    figure.suptitle(
        f"Figure {number} of arXiv:2311.09406, simulated again: d = {parts[0].panel.dim}, 32 keys", fontsize=10
    )
    foot(figure, findings.source(), looks)
    return figure


def _lines(findings: Findings, axis: str, label: str) -> Figure:
    """Draw a panel a measure over one axis of the points, and a line a mode or several that coincide."""
    figure = Figure(figsize=(10.5, 7.2), layout="constrained")
    ordered = sorted(findings.along(axis), key=lambda point: getattr(point, axis))
    xs = [getattr(point, axis) for point in ordered]
    groups = _coinciding(findings, ordered)
    looks = {", ".join(modes): style(index) for index, modes in enumerate(groups)}
    for axes, measure in zip(figure.subplots(2, 3).flat, BY_COUNT, strict=True):
        for index, (modes, look) in enumerate(zip(groups, looks.values(), strict=True)):
            ys = _shown([findings.value(point, modes[0], measure) for point in ordered], measure)
            axes.plot(xs, ys, **look, markevery=staggered(index, len(groups), 2 * len(xs)))
        axes.set_xlabel(label)
        axes.set_title(TITLES[measure].replace(": ", ":\n"), fontsize=9)
        axes.set_xscale("log", base=2)
        ticks_at(axes.xaxis, xs)
        if measure not in _LINEAR:
            axes.set_yscale("log")
        axes.grid(alpha=0.3)
    first = ordered[0]
    fixed = f"d = {first.dim}" if axis == "count" else f"n = {first.count:,}"
    figure.suptitle(_fading(findings, ordered) if axis == "count" else _moving(findings, ordered), fontsize=11)
    about = f"{first.keys} keys, {fixed}; modes within {_TOGETHER - 1:.0%} of each other share a line"
    foot(figure, f"{findings.source()}; {about}", looks, columns=3)
    return figure


def _fading(findings: Findings, points: list[Point]) -> str:
    last = points[-1]
    kept = [f'"{mode}"' for mode in findings.modes if findings.value(last, mode, "max_probability") > _FADED]
    modes = f"all modes but {', '.join(kept)}" if kept else "all modes"
    return f"Attention fades with {modes}: max probability below {_FADED} at {last.count:,} keys"


def _moving(findings: Findings, points: list[Point]) -> str:
    moved = []
    for mode in findings.modes:
        values = [findings.value(point, mode, "relative_entropy") for point in points]
        if max(values) - min(values) > _MOVED:
            moved.append(f'"{mode}"')
    return f"The head dim moves entropy / ln n by more than {_MOVED} only with {', '.join(moved) or 'no mode'}"


def _coinciding(findings: Findings, points: list[Point]) -> list[list[str]]:
    """Group the modes whose measures are within 10% of those of their group's first at every point."""
    groups: list[list[str]] = []
    for mode in findings.modes:
        for group in groups:
            pairs = (
                (findings.value(point, mode, measure), findings.value(point, group[0], measure))
                for point in points
                for measure in BY_COUNT
            )
            if all(max(pair) <= _TOGETHER * max(min(pair), _FLOOR) for pair in pairs):
                group.append(mode)
                break
        else:
            groups.append([mode])
    return groups


def _by_keys(findings: Findings) -> Figure:
    points = findings.along("keys")
    figure = Figure(figsize=(10.5, 5.6), layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True)
    columns = [point.keys for point in points]
    entropy = [[findings.value(point, mode, "relative_entropy") for point in points] for mode in findings.modes]
    _heatmap(left, entropy, findings.modes, columns, 2, (0.0, 1.0))
    left.set_title("entropy / ln n: 0 is one key, 1 is uniform", fontsize=9)
    gradient = [
        _shown([findings.value(x, mode, "q_gradient") for x in points], "q_gradient") for mode in findings.modes
    ]
    _heatmap(right, torch.tensor(gradient).log10().tolist(), findings.modes, columns, 1, None)
    right.set_title("log10 of the gradient that reaches a row of q", fontsize=9)
    same = [mode for mode, row in zip(findings.modes, entropy, strict=True) if max(row) - min(row) <= _MOVED]
    found = ", ".join(f'"{mode}"' for mode in same) or "no mode"
    figure.suptitle(f"Entropy / ln n is within {_MOVED} for all kinds of keys only with {found}", fontsize=11)
    foot(figure, f"{findings.source()}; n = {points[0].count:,}, d = {points[0].dim}")
    return figure


def two_ways(findings: Findings) -> Figure:
    """Draw every point of the sweep in a panel a mode, those of the others in grey.

    A gradient that vanishes at the left is uniform, at the right one-hot.
    """
    low = 1e-10
    xs, ys, uniform, one_hot = {}, {}, {}, {}
    for mode in findings.modes:
        found = [findings.sweep[point, mode] for point in findings.points]
        xs[mode] = _shown([x.logit_std for x in found], "logit_std")
        ys[mode] = [max(x.logit_std * x.jacobian_norm, low) for x in found]
        uniform[mode], one_hot[mode] = fmean(x.near_uniform for x in found), fmean(x.near_one_hot for x in found)
    count = len(findings.modes)
    columns = min(count, min((5, 4, 6), key=lambda columns: -count % columns))  # few cells left empty
    rows = math.ceil(count / columns)
    figure = Figure(figsize=(10.5, 2.2 * rows + 1), layout="constrained")
    panels = figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False)
    for axes in panels.flat[len(findings.modes) :]:
        axes.set_axis_off()
    everywhere = [x for one in xs.values() for x in one], [y for one in ys.values() for y in one]
    for axes, mode in zip(panels.flat, findings.modes, strict=False):
        axes.plot(*everywhere, ".", color=_OTHERS, markersize=2)
        axes.plot(xs[mode], ys[mode], "o", color=COLOURS[2], markersize=3)
        axes.set(xscale="log", yscale="log", ylim=(low / 3, 3 * max(everywhere[1])))
        axes.set_title(f"{mode}\n{uniform[mode]:.0%} uniform, {one_hot[mode]:.0%} one-hot", fontsize=9)
        axes.grid(alpha=0.3)
    for axes in panels.flat[max(0, len(findings.modes) - panels.shape[1]) : len(findings.modes)]:  # lowest of a column
        axes.set_xlabel("deviation of the logits", fontsize=9)
        axes.tick_params(labelbottom=True)
    figure.supylabel(f"Jacobian's norm times that deviation; {low:g}: that or less", fontsize=10)
    least = min(findings.modes, key=lambda mode: uniform[mode] + one_hot[mode])
    title = f"Gradients vanish where rows are uniform (left) or one-hot (right): least often with {least}"
    figure.suptitle(title, fontsize=11)
    rows_of = f"a point is a number and kind of keys; rows are uniform from entropy / ln n {UNIFORM}"
    foot(figure, f"{findings.source()}; {rows_of}, one-hot from max probability {ONE_HOT}")
    return figure


def _verdict(findings: Findings) -> Figure:
    figure = Figure(figsize=(10.5, 5.8), layout="constrained")
    columns = [condition.name.replace(" ", "\n") for condition in findings.conditions]
    for axes, (name, title) in zip(
        figure.subplots(1, 2, sharey=True),
        (("as_published", "as published"), ("tuned", "with the best gain for the whole batch")),
        strict=True,
    ):
        reach = [[getattr(findings.verdict[x, mode], name) for x in findings.conditions] for mode in findings.modes]
        _heatmap(axes, reach, findings.modes, columns, 2, (0.0, 0.7))
        axes.set_title(title, fontsize=9)
    figure.suptitle("Mean share of the largest gradient that a row could have at any temperature", fontsize=10)
    foot(figure, findings.source())
    return figure


def _heatmap(
    axes: Axes,
    values: list[list[float]],
    rows: list[str],
    columns: list[str],
    digits: int,
    limits: tuple[float, float] | None,
) -> None:
    every = [value for line in values for value in line]
    low, high = limits or (min(every), max(every))
    axes.imshow(values, aspect="auto", cmap="cividis", vmin=low, vmax=high)
    axes.set_xticks(range(len(columns)), columns, fontsize=7, rotation=45 if len(columns) > 6 else 0)
    axes.set_yticks(range(len(rows)), rows, fontsize=8)
    for y, line in enumerate(values):
        for x, value in enumerate(line):
            text = f"{round(value, digits) + 0.0:.{digits}f}"  # + 0.0: no -0.0
            colour = _ON_LIGHT if value > (low + high) / 2 else _ON_DARK
            axes.text(x, y, text, ha="center", va="center", fontsize=8, color=colour)


def _shown(values: list[float], measure: str) -> list[float]:
    return values if measure in _LINEAR else [max(value, _FLOOR) for value in values]
