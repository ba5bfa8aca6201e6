"""Losses by position as tables, JSON and a picture."""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure
from torch import Tensor

from ...core.provenance import Environment
from ...core.records import write
from ...core.tables import table
from ..figures import COLOURS, foot, plain_numbers, save, staggered, styles

_NORMAL = 1.96  # quantile of a 95% interval
_LINEAR = 0.01  # differences up to here stand on a linear part of their axis


@dataclass(frozen=True, eq=False)
class Study:
    """Losses of a model by position.

    losses       by variant, the baseline first: [S - 1], entry i of token i + 1
    alone        losses of the baseline without the tokens before `start`: entry i of token start + 1 + i
    context      positions that the model was trained on
    """

    model: str
    text: str
    context: int
    bin: int
    losses: dict[str, Tensor]
    start: int
    alone: Tensor
    environment: Environment
    command: str
    quick: bool

    @property
    def tokens(self) -> int:
        return self.baseline.shape[0] + 1

    @property
    def baseline(self) -> Tensor:
        return next(iter(self.losses.values()))

    def bins(self) -> list[tuple[int, int]]:
        """Split the token numbers, from 1 on, into ranges."""
        edges = [1, *range(self.bin, self.tokens, self.bin), self.tokens]
        return [(lo, hi) for lo, hi in pairwise(edges) if lo < hi]

    def table(self) -> str:
        """One row a variant: mean loss within the trained context and beyond, and its difference from the baseline."""
        edges = (1, self.context // 2, self.context, self.tokens)
        parts = [(max(1, lo), min(hi, self.tokens)) for lo, hi in pairwise(edges)]
        parts = [(lo, hi) for lo, hi in parts if lo < hi]
        headers = ["scaling"]
        for lo, hi in parts:
            headers += [f"loss, tokens {lo} to {hi - 1}", "moved"]
        rows = []
        for name, values in self.losses.items():
            rows.append([name])
            for lo, hi in parts:
                loss, base = values[lo - 1 : hi - 1].double(), self.baseline[lo - 1 : hi - 1].double()
                rows[-1] += [f"{loss.mean():.4f}", "-" if values is self.baseline else difference(loss - base)]
        first = max(self.context, self.start + 1)
        if first < self.tokens:
            loss, base = self.alone[first - self.start - 1 :].double(), self.baseline[first - 1 :].double()
            blank = [""] * (2 * len(parts) - 2)
            without = f"sqrt_dim, nothing before {self.start}"
            rows.append([without, *blank, f"{loss.mean():.4f}", difference(loss - base)])
        return table(rows, headers)

    def by_position(self) -> str:
        """One row a range of tokens: the mean loss of every variant."""
        rows = [
            (f"{lo} to {hi - 1}", *(f"{_mean(values, lo - 1, hi - 1):.3f}" for values in self.losses.values()))
            for lo, hi in self.bins()
        ]
        return table(rows, ["tokens", *self.losses])

    def record(self) -> dict[str, Any]:
        bins, first = self.bins(), self.start + 1  # the token of entry 0 of `alone`
        later = [(lo - first, hi - first) for lo, hi in bins if lo >= first]
        alone = [round(_mean(self.alone, lo, hi), 4) for lo, hi in later]
        return {
            "model": self.model,
            "text": self.text,
            "tokens": self.tokens,
            "context": self.context,
            "quick": self.quick,
            "environment": asdict(self.environment),
            "command": self.command,
            "bins": bins,
            "loss": {name: [round(_mean(x, lo - 1, hi - 1), 4) for lo, hi in bins] for name, x in self.losses.items()},
            "second_part_alone": {
                "start": self.start,
                "loss": round(float(self.alone.mean()), 4),
                "by_bin": alone,
            },
        }

    def write_json(self, file: Path) -> None:
        write(file, json.dumps(self.record()) + "\n")


def _mean(values: Tensor, lo: int, hi: int) -> float:
    return float(values[lo:hi].mean())


def difference(values: Tensor) -> str:
    """Format the mean of differences, as if independent, with its 95% interval; a star where it excludes 0."""
    n = values.shape[0]
    half = _NORMAL * float(values.std()) / math.sqrt(n) if n > 1 else math.inf
    mean = float(torch.mean(values))
    return f"{mean:+.4f} ± {half:.4f}" + " *" * (abs(mean) > half)


def draw(record: dict[str, Any], file: Path) -> None:
    save(figure_of(record), file)


def figure_of(record: dict[str, Any]) -> Figure:
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
        axes.set_xlabel(f"position (line: end of the trained context, {record['context']:,})")
        axes.xaxis.set_major_formatter("{x:,.0f}")
        axes.set_ylabel("nats a token")
    loss.set_title("Loss by position", fontsize=10)
    moved.set_title(f"The same, less {next(iter(losses))}'s", fontsize=10)
    moved.set_yscale("symlog", linthresh=_LINEAR)
    moved.set_ylim(bottom=min(-1.5 * _LINEAR, 1.5 * moved.dataLim.y0))
    plain_numbers(moved.yaxis)
    figure.suptitle(_message(record), fontsize=12)
    about = f"{record['tokens']:,} tokens of {record['text']}"
    foot(figure, f"Measured: {about}. {Environment(**record['environment'])}, `{record['command']}`", looks, columns=4)
    return figure


def _message(record: dict[str, Any]) -> str:
    """The scaling with the lowest mean loss beyond the trained context, or else in all of the text."""
    losses, bins = record["loss"], record["bins"]
    beyond = [index for index, (lo, _) in enumerate(bins) if lo >= record["context"]]
    where = "beyond the trained context" if beyond else "within the trained context"
    means = {
        name: math.fsum(values[index] * (bins[index][1] - bins[index][0]) for index in beyond or range(len(bins)))
        for name, values in losses.items()
    }
    best, base = min(means, key=means.__getitem__), next(iter(means))
    found = f"no scaling lowers {base}'s loss" if best == base else f"{best} has the lowest loss"
    return f"{record['model']}: {found} {where}"


def _less(values: list[float], base: list[float]) -> list[float]:
    return [one - other for one, other in zip(values, base, strict=True)]
