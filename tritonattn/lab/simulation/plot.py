"""Pictures of a simulation."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.mlab import GaussianKDE
from torch import Tensor

from .measures import Point
from .paper import Component
from .report import BY_COUNT, TITLES, Findings

_DPI = 72
_FLOOR = 1e-20  # the lowest value on a logarithmic axis
_LINEAR = ("relative_entropy",)


def draw_all(findings: Findings, folder: Path) -> list[Path]:
    """Draw every picture that has figures, and return the paths."""
    figures: dict[str, Figure] = {}
    for number in dict.fromkeys(part.panel.figure for part in findings.components):
        figures[f"paper_figure_{number}"] = _paper(number, findings.components)
    if findings.sweep:
        figures["by_count"] = _lines(findings, findings.by_count(), "count", "keys")
        figures["by_dim"] = _lines(findings, findings.by_dim(), "dim", "head dimension")
        figures["by_keys"] = _by_keys(findings)
        figures["two_ways"] = _two_ways(findings)
    if findings.verdict:
        figures["verdict"] = _verdict(findings)
    written = []
    for name, figure in figures.items():
        written.append(folder / f"{name}.png")
        figure.savefig(written[-1], dpi=_DPI)
    return written


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


def _paper(number: int, components: list[Component]) -> Figure:
    parts = [part for part in components if part.panel.figure == number]
    figure = Figure(figsize=(4.3 * len(parts), 3.4), layout="constrained")
    for axes, part in zip(figure.subplots(1, len(parts), squeeze=False)[0], parts, strict=True):
        axes.plot(*density(part.values), color="C0", label="key 1 over 500 queries")
        axes.plot(*density(part.as_published), "--", color="C1", label="as the package reads it")
        axes.plot(part.values, torch.zeros_like(part.values), "|", color="C0", alpha=0.35, markersize=12)
        label = "value" if part.panel.mode is None else "probability"
        axes.set(title=f"({part.panel.letter}) {part.panel.title}", xlabel=label, ylabel="density")
        axes.title.set_fontsize(9)
        axes.legend(fontsize=7)
    figure.suptitle(
        f"Figure {number} of arXiv:2311.09406, simulated anew: d = {parts[0].panel.dim}, 32 keys", fontsize=10
    )
    return figure


def _lines(findings: Findings, points: list[Point], axis: str, label: str) -> Figure:
    """Draw a panel a measure and a line a mode, over one axis of the points."""
    figure = Figure(figsize=(12, 6), layout="constrained")
    xs = sorted({getattr(point, axis) for point in points})
    ordered = sorted(points, key=lambda point: getattr(point, axis))
    for axes, measure in zip(figure.subplots(2, 3).flat, BY_COUNT, strict=True):
        for mode in findings.modes:
            ys = [findings.value(point, mode, measure) for point in ordered]
            axes.plot(xs, _shown(ys, measure), **_style(findings, mode), label=mode)
        axes.set(title=TITLES[measure], xlabel=label)
        axes.title.set_fontsize(9)
        axes.set_xscale("log", base=2)
        if measure not in _LINEAR:
            axes.set_yscale("log")
        axes.grid(alpha=0.3)
    handles, labels = figure.axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside right center", fontsize=8)
    first = ordered[0]
    fixed = f"d = {first.dim}" if axis == "count" else f"n = {first.count}"
    figure.suptitle(f"{first.keys} keys, {fixed}", fontsize=10)
    return figure


def _by_keys(findings: Findings) -> Figure:
    points = findings.by_keys()
    figure = Figure(figsize=(13, 5.2), layout="constrained")
    panels = figure.subplots(1, 2)
    columns = [point.keys for point in points]
    entropy = [[findings.value(point, mode, "relative_entropy") for point in points] for mode in findings.modes]
    _heatmap(panels[0], entropy, findings.modes, columns, "{:.2f}", (0.0, 1.0))
    panels[0].set_title("entropy / ln n: 0 is one key, 1 is uniform", fontsize=9)
    gradient = [
        _shown([findings.value(x, mode, "q_gradient") for x in points], "q_gradient") for mode in findings.modes
    ]
    _heatmap(panels[1], torch.tensor(gradient).log10().tolist(), findings.modes, columns, "{:.1f}", None)
    panels[1].set_title("log10 of the gradient that reaches a row of q", fontsize=9)
    figure.suptitle(f"n = {points[0].count}, d = {points[0].dim}", fontsize=10)
    return figure


def _two_ways(findings: Findings) -> Figure:
    """Draw every point of the sweep: a gradient that vanishes at the left is uniform, at the right one-hot."""
    figure = Figure(figsize=(9, 5), layout="constrained")
    axes = figure.subplots()
    for mode in findings.modes:
        found = [findings.sweep[point, mode] for point in findings.points]
        xs, ys = [x.logit_std for x in found], [x.logit_std * x.jacobian_norm for x in found]
        axes.plot(_shown(xs, "logit_std"), ys, **{**_style(findings, mode), "linestyle": ""}, label=mode)
    axes.set(
        xscale="log",
        yscale="log",
        ylim=(1e-10, 10),
        xlabel=TITLES["logit_std"],
        ylabel="Jacobian's norm times that deviation",
    )
    axes.grid(alpha=0.3)
    figure.legend(loc="outside right center", fontsize=8)
    title = "Two ways for a gradient to vanish: uniform (left) and one-hot (right); every mode, number and kind of keys"
    figure.suptitle(title, fontsize=10)
    return figure


def _verdict(findings: Findings) -> Figure:
    figure = Figure(figsize=(13, 5.6), layout="constrained")
    columns = [condition.name.replace(" ", "\n") for condition in findings.conditions]
    for axes, (name, title) in zip(
        figure.subplots(1, 2),
        (("as_published", "as published"), ("tuned", "with the best gain for the whole batch")),
        strict=True,
    ):
        reach = [[getattr(findings.verdict[x, mode], name) for x in findings.conditions] for mode in findings.modes]
        _heatmap(axes, reach, findings.modes, columns, "{:.2f}", (0.0, 0.7))
        axes.set_title(title, fontsize=9)
    figure.suptitle("Mean share of the largest gradient that a row could have at a temperature of its own", fontsize=10)
    return figure


def _heatmap(
    axes: Axes,
    values: list[list[float]],
    rows: list[str],
    columns: list[str],
    text: str,
    limits: tuple[float, float] | None,
) -> None:
    low, high = limits or (None, None)
    axes.imshow(values, aspect="auto", cmap="viridis", vmin=low, vmax=high)
    axes.set_xticks(range(len(columns)), columns, fontsize=7, rotation=30 if len(columns) > 6 else 0)
    axes.set_yticks(range(len(rows)), rows, fontsize=8)
    for y, line in enumerate(values):
        for x, value in enumerate(line):
            axes.text(
                x,
                y,
                text.format(value),
                ha="center",
                va="center",
                fontsize=7,
                color="white",
                bbox={"facecolor": "black", "alpha": 0.35, "pad": 0.8, "linewidth": 0},
            )


def _shown(values: list[float], measure: str) -> list[float]:
    return values if measure in _LINEAR else [max(value, _FLOOR) for value in values]


def _style(findings: Findings, mode: str) -> dict[str, Any]:
    number = findings.modes.index(mode)
    return {
        "color": f"C{number % 10}",
        "marker": "ovs"[number // 10 % 3],
        "linestyle": ("-", "--", ":")[number // 10 % 3],
        "markersize": 3,
        "linewidth": 1,
    }
