"""Pictures of a simulation."""

from __future__ import annotations

import textwrap
from collections.abc import Iterable
from statistics import fmean

import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.mlab import GaussianKDE
from torch import Tensor

from ...analysis.diagnosis import ONE_HOT, UNIFORM
from ..figures import COLOURS, foot, panels, staggered, style, ticks_at
from .measures import Point
from .report import BY_COUNT, TITLES, Findings

_FLOOR = 1e-20  # the lowest value on a logarithmic axis
_TOGETHER = 1.1  # lines that differ by less at every point are drawn as one
_FADED = 0.1  # a largest probability that has faded
_MOVED = 0.04  # a change of entropy / ln n to speak of
_LEAST = 1e-10  # the least gradient of two_ways; lower ones are drawn there
_ON_LIGHT, _ON_DARK = "#111111", "#EEEEEE"  # text in cells, whose colours no theme changes


def figures_of(findings: Findings) -> dict[str, Figure]:
    """Draw every picture that has figures, by its name."""
    numbers = dict.fromkeys(part.panel.figure for part in findings.components)
    figures = {f"paper_figure_{number}": _paper(number, findings) for number in numbers}
    if findings.sweep:
        figures["by_count"] = _lines(findings, "count", "keys")
        figures["by_dim"] = _lines(findings, "dim", "head dim")
        figures["by_keys"] = _by_keys(findings)
        figures["two_ways"] = _two_ways(findings)
    if findings.verdict:
        figures["verdict"] = _verdict(findings)
    return figures


def _density(values: Tensor) -> tuple[Tensor, Tensor]:
    """Estimate a kernel density over the range of the values, with the bandwidth of R's density(): nrd0."""
    spread = values.std()
    low, high = values.quantile(torch.tensor([0.25, 0.75], dtype=values.dtype))
    narrower = torch.minimum(spread, (high - low) / 1.34)
    bandwidth = 0.9 * (narrower if narrower > 0 else spread) * len(values) ** -0.2
    x = torch.linspace(float(values.min()), float(values.max()), 512, dtype=values.dtype)
    if bandwidth == 0:
        return x, torch.zeros_like(x)
    return x, torch.from_numpy(GaussianKDE(values.numpy(), float(bandwidth / spread))(x.numpy()))


def _paper(number: int, findings: Findings) -> Figure:
    parts = [part for part in findings.components if part.panel.figure == number]
    figure = Figure(figsize=(3.5 * len(parts), 3.8), layout="constrained")
    ours, published = {"color": COLOURS[2], "linestyle": "-"}, {"color": COLOURS[1], "linestyle": "--"}
    for axes, part in zip(figure.subplots(1, len(parts), squeeze=False)[0], parts, strict=True):
        axes.plot(*_density(part.values), **ours)
        axes.plot(*_density(part.as_published), **published)
        axes.plot(part.values, torch.zeros_like(part.values), "|", color=ours["color"], alpha=0.35, markersize=12)
        axes.set(xlabel="value" if part.panel.mode is None else "probability", ylabel="density")
        axes.set_title(textwrap.fill(f"({part.panel.letter}) {part.panel.title}", 36), fontsize=9)
    title = f"Figure {number} of arXiv:2311.09406, simulated again: d = {parts[0].panel.dim}, 32 keys"
    figure.suptitle(title, fontsize=10)
    names = "key 1 over 500 queries", "column 1 as the published package orders it"
    foot(figure, findings.source(), dict(zip(names, (ours, published), strict=True)))
    return figure


def _lines(findings: Findings, axis: str, label: str) -> Figure:
    """Draw a panel per measure over one axis of the points, and a line per mode or several that coincide."""
    figure = Figure(figsize=(10.5, 7.2), layout="constrained")
    points = sorted(findings.along(axis), key=lambda point: getattr(point, axis))
    xs = [getattr(point, axis) for point in points]
    groups = _coinciding(findings, points)
    looks = {", ".join(modes): style(index) for index, modes in enumerate(groups)}
    for axes, measure in zip(figure.subplots(2, 3).flat, BY_COUNT, strict=True):
        for index, (modes, look) in enumerate(zip(groups, looks.values(), strict=True)):
            marks = staggered(index, len(groups), 2 * len(xs))
            axes.plot(xs, _values(findings, points, modes[0], measure), **look, markevery=marks)
        axes.set_xlabel(label)
        axes.set_title(TITLES[measure].replace(": ", ":\n"), fontsize=9)
        axes.set_xscale("log", base=2)
        ticks_at(axes.xaxis, xs)
        if measure != "relative_entropy":
            axes.set_yscale("log")
        axes.grid(alpha=0.3)
    first, last = points[0], points[-1]
    if axis == "count":
        fixed = f"d = {first.dim}"
        kept = [mode for mode in findings.modes if findings.value(last, mode, "max_probability") > _FADED]
        faded = f"all modes but {_quoted(kept)}" if kept else "all modes"
        title = f"Attention fades with {faded}: max probability below {_FADED} at {last.count:,} keys"
    else:
        fixed = f"n = {first.count:,}"
        moved = _quoted(mode for mode in findings.modes if _moves(findings, points, mode))
        title = f"The head dim moves entropy / ln n by more than {_MOVED} only with {moved or 'no mode'}"
    figure.suptitle(title, fontsize=11)
    about = f"{first.keys} keys, {fixed}; modes within {_TOGETHER - 1:.0%} of each other share a line"
    foot(figure, f"{findings.source()}; {about}", looks, columns=3)
    return figure


def _values(findings: Findings, points: list[Point], mode: str, measure: str) -> list[float]:
    """List a measure of a mode at points, as an axis shows it."""
    floor = 0.0 if measure == "relative_entropy" else _FLOOR
    return [max(findings.value(point, mode, measure), floor) for point in points]


def _moves(findings: Findings, points: list[Point], mode: str) -> bool:
    values = _values(findings, points, mode, "relative_entropy")
    return max(values) - min(values) > _MOVED


def _quoted(modes: Iterable[str]) -> str:
    return ", ".join(f'"{mode}"' for mode in modes)


def _coinciding(findings: Findings, points: list[Point]) -> list[list[str]]:
    """Group modes whose measures are within 10% of the group's first mode at every point."""
    values = {
        mode: [max(findings.value(point, mode, measure), _FLOOR) for point in points for measure in BY_COUNT]
        for mode in findings.modes
    }

    def coincide(one: str, other: str) -> bool:
        return all(max(pair) <= _TOGETHER * min(pair) for pair in zip(values[one], values[other], strict=True))

    groups: dict[str, list[str]] = {}
    for mode in findings.modes:
        first = next((first for first in groups if coincide(mode, first)), mode)
        groups.setdefault(first, []).append(mode)
    return list(groups.values())


def _by_keys(findings: Findings) -> Figure:
    points = findings.along("keys")
    figure = Figure(figsize=(10.5, 5.6), layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True)
    names = [point.keys for point in points]
    entropy = [_values(findings, points, mode, "relative_entropy") for mode in findings.modes]
    _heatmap(left, entropy, findings.modes, names, 2, (0.0, 1.0))
    left.set_title("entropy / ln n: 0 is one key, 1 is uniform", fontsize=9)
    gradient = torch.tensor([_values(findings, points, mode, "q_gradient") for mode in findings.modes]).log10()
    _heatmap(right, gradient.tolist(), findings.modes, names, 1, None)
    right.set_title("log10 of the gradient that reaches a row of q", fontsize=9)
    same = _quoted(mode for mode in findings.modes if not _moves(findings, points, mode)) or "no mode"
    figure.suptitle(f"Entropy / ln n is within {_MOVED} for all distributions of keys only with {same}", fontsize=11)
    foot(figure, f"{findings.source()}; n = {points[0].count:,}, d = {points[0].dim}")
    return figure


def _two_ways(findings: Findings) -> Figure:
    """Draw every point of the sweep in a panel per mode, those of the others in grey.

    A gradient that vanishes at the left is uniform, at the right one-hot.
    """
    drawn, shares = {}, {}
    for mode in findings.modes:
        found = [by_mode[mode] for by_mode in findings.sweep.values()]
        ys = [max(x.logit_std * x.jacobian_norm, _LEAST) for x in found]
        drawn[mode] = [max(x.logit_std, _FLOOR) for x in found], ys
        shares[mode] = fmean(x.near_uniform for x in found), fmean(x.near_one_hot for x in found)
    count = len(findings.modes)
    columns = min(count, min((5, 4, 6), key=lambda columns: -count % columns))  # few panels left empty
    figure, grid = panels(count, columns, (2.2, 1), "deviation of the logits", sharey=True, fontsize=9)
    everywhere = [x for xs, _ in drawn.values() for x in xs], [y for _, ys in drawn.values() for y in ys]
    for axes, mode in zip(grid, findings.modes, strict=True):
        axes.plot(*everywhere, ".", color="#D0D0D0", markersize=2)
        axes.plot(*drawn[mode], "o", color=COLOURS[2], markersize=3)
        axes.set(xscale="log", yscale="log", ylim=(_LEAST / 3, 3 * max(everywhere[1])))
        axes.set_title("{}\n{:.0%} uniform, {:.0%} one-hot".format(mode, *shares[mode]), fontsize=9)
        axes.grid(alpha=0.3)
    figure.supylabel(f"Jacobian's norm times that deviation; {_LEAST:g}: that or less", fontsize=10)
    least = min(findings.modes, key=lambda mode: sum(shares[mode]))
    title = f"Gradients vanish where rows are uniform (left) or one-hot (right): least often with {least}"
    figure.suptitle(title, fontsize=11)
    rows_of = f"a point is a number and distribution of keys; rows are uniform from entropy / ln n {UNIFORM}"
    foot(figure, f"{findings.source()}; {rows_of}, one-hot from max probability {ONE_HOT}")
    return figure


def _verdict(findings: Findings) -> Figure:
    figure = Figure(figsize=(10.5, 5.8), layout="constrained")
    conditions = [condition.name.replace(" ", "\n") for condition in findings.verdict]
    titles = {"as_published": "as published", "tuned": "with the best gain for the whole batch"}
    for axes, (name, title) in zip(figure.subplots(1, 2, sharey=True), titles.items(), strict=True):
        reach = [[getattr(found[mode], name) for found in findings.verdict.values()] for mode in findings.modes]
        _heatmap(axes, reach, findings.modes, conditions, 2, (0.0, 0.7))
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
    low, high = limits or (min(map(min, values)), max(map(max, values)))
    axes.imshow(values, aspect="auto", cmap="cividis", vmin=low, vmax=high)
    axes.set_xticks(range(len(columns)), columns, fontsize=7, rotation=45 if len(columns) > 6 else 0)
    axes.set_yticks(range(len(rows)), rows, fontsize=8)
    for y, line in enumerate(values):
        for x, value in enumerate(line):
            text = f"{round(value, digits) + 0.0:.{digits}f}"  # + 0.0: no -0.0
            colour = _ON_LIGHT if value > (low + high) / 2 else _ON_DARK
            axes.text(x, y, text, ha="center", va="center", fontsize=8, color=colour)
