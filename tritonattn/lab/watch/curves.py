"""The records of a Monitor as curves over steps."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import takewhile
from pathlib import Path
from typing import Any

from ...analysis.alarms import LOSS, Alarm, layer_value
from ...core.errors import CommandError

# Measure: title, and its axis. "share" is from 0 to 1, "norm" and "variance" are logarithmic.
MEASURES = {
    LOSS: ("loss", ""),
    "max_logit": ("largest logit", ""),
    "relative_entropy": ("entropy / ln n", "share"),
    "near_one_hot": ("share of rows nearly one-hot", "share"),
    "near_uniform": ("share of rows nearly uniform", "share"),
    "q_gradient_norm": ("gradient norm of q", "norm"),
    "k_gradient_norm": ("gradient norm of k", "norm"),
    "output_variance": ("variance of the output", "variance"),
}
_LOGARITHMIC = ("norm", "variance")
_SMALLEST, _LARGEST = 1e-45, 3.5e38  # of fp32: an axis cannot hold fp64's
_EXPECTED = "FILE: expected JSON lines that a Monitor wrote, got"


@dataclass(frozen=True)
class Record:
    """A watched step: its alarms, and each measure by layer, as thresholds take it; NaN where no value is finite."""

    step: int
    loss: float
    alarms: list[Alarm]
    layers: dict[str, dict[str, float]]

    def value(self, measure: str, layer: str | None) -> float:
        """Return a measure of a layer; of all layers, None, the largest logit or the mean of another measure."""
        if measure == LOSS:
            return self.loss
        if layer is not None:
            return self.layers.get(layer, {}).get(measure, math.nan)
        values = [found.get(measure, math.nan) for found in self.layers.values()]
        value = layer_value(measure, [None if math.isnan(x) else x for x in values])
        return math.nan if value is None else value


@dataclass(frozen=True)
class Panel:
    """One measure: a curve of (step, value) per line, interrupted by NaN; the steps where alarms begin; its limits."""

    measure: str
    curves: dict[str, list[tuple[int, float]]]
    alarms: list[Alarm]
    limits: list[float]

    @property
    def title(self) -> str:
        return MEASURES[self.measure][0]

    @property
    def axis(self) -> str:
        return MEASURES[self.measure][1]

    @property
    def logarithmic(self) -> bool:
        return self.axis in _LOGARITHMIC

    @property
    def is_empty(self) -> bool:
        values = [value for points in self.curves.values() for _, value in points]
        return all(map(math.isnan, values)) and not (self.limits or self.alarms)


@dataclass(frozen=True)
class Run:
    """The records of a file."""

    name: str
    records: list[Record]

    @classmethod
    def read(cls, file: Path, name: str) -> Run:
        """Read a file; torn lines are named on stderr and skipped. Raises CommandError if it has no record."""
        try:
            lines = file.read_text(encoding="utf-8-sig").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            why = error.strerror if isinstance(error, OSError) else "it is no text"
            raise CommandError(f"{_EXPECTED} {str(file)!r}: {why}") from error
        if not lines:
            raise CommandError(f"FILE: expected at least one record of a Monitor, got {str(file)!r}, which is empty")
        records, refused = [], {}
        for number, line in enumerate(lines, 1):
            try:
                records.append(_decoded(json.loads(line)))
            except (ValueError, TypeError, KeyError, RecursionError, OverflowError) as error:
                refused[number] = error
        if not records:
            raise CommandError(f"{_EXPECTED} {str(file)!r}, whose first line is none: {refused[1]}")
        for number, error in refused.items():
            print(f"{file}:{number}: expected a record of a Monitor, skipped: {error}", file=sys.stderr)
        run = cls(name, records)
        if not Watched([run]).panels:
            raise CommandError(f"FILE: expected a loss or a layer's measure in a record, got none in {str(file)!r}")
        return run

    @cached_property
    def layers(self) -> list[str]:
        """The layers' names, in the order in which they ran."""
        return list(dict.fromkeys(name for record in self.records for name in record.layers))

    @property
    def alarms(self) -> list[Alarm]:
        """The alarms, each in the step in which it begins."""
        return [one for record in self.records for one in record.alarms if one.new]

    def latest(self) -> Record:
        """Return the last step in which layers were watched, or the last of all."""
        return next((record for record in reversed(self.records) if record.layers), self.records[-1])

    def summary(self) -> str:
        """Count records, layers and alarms, and name the range of steps."""
        steps, layers = [record.step for record in self.records], self.layers
        before, after = _shared([name.split(".") for name in layers]) if len(layers) > 1 else ([], [])
        names = f" ({'.'.join([*before, '*', *after])})" if len(layers) > 1 else ""
        return (
            f"{self.name}: {_counted(len(self.records), 'record')} of {_counted(len(layers), 'layer')}{names}, "
            f"steps {min(steps)} to {max(steps)}, {_counted(len(self.alarms), 'alarm')}"
        )

    def curve(self, measure: str, layer: str | None) -> list[tuple[int, float]]:
        """List the values of a measure, see `Record.value`, at their steps."""
        smallest = _SMALLEST if MEASURES[measure][1] in _LOGARITHMIC else -_LARGEST
        points: list[tuple[int, float]] = []
        for record in self.records:
            if measure != LOSS and not record.layers:
                continue
            value = record.value(measure, layer)
            if points and record.step <= points[-1][0]:  # a later run, or one that went back to a checkpoint
                points.append((record.step, math.nan))
            points.append((record.step, value if smallest <= value <= _LARGEST else math.nan))
        return points


@dataclass(frozen=True)
class Watched:
    """The lines of a picture: one for each layer of one run, or for each of several runs."""

    runs: list[Run]

    @classmethod
    def read(cls, *files: Path) -> Watched:
        """Read files, each once; their names are the parts in which their paths differ."""
        once = list(dict.fromkeys(files))
        alone = len(once) == 1
        names = [once[0].name] if alone else [str(Path(*parts)) for parts in _distinct([file.parts for file in once])]
        return cls([Run.read(file, name) for file, name in zip(once, names, strict=True)])

    @property
    def series(self) -> str:
        """The word for a line."""
        return "layer" if len(self.runs) == 1 else "run"

    @cached_property
    def lines(self) -> dict[str, tuple[Run, str | None]]:
        """The run and the layer, None being all, by the line's name."""
        if len(self.runs) == 1:
            return {layer: (self.runs[0], layer) for layer in self.runs[0].layers}
        return {run.name: (run, None) for run in self.runs}

    def short_names(self) -> dict[str, str]:
        """Name lines by the parts in which their layers' names differ: a layer's number, as a rule."""
        names = list(self.lines)
        if self.series == "run" or len(names) < 2:
            return dict(zip(names, names, strict=True))
        return dict(zip(names, map(".".join, _distinct([name.split(".") for name in names])), strict=True))

    @cached_property
    def panels(self) -> list[Panel]:
        """One panel per measure, without those that were never recorded."""
        return [panel for panel in map(self._panel, MEASURES) if not panel.is_empty]

    def summary(self) -> str:
        return "; ".join(run.summary() for run in self.runs)

    def _panel(self, measure: str) -> Panel:
        of_run = measure == LOSS and len(self.runs) == 1
        lines = {"": (self.runs[0], None)} if of_run else self.lines
        alarms = [one for run in self.runs for record in run.records for one in record.alarms if one.measure == measure]
        limits = sorted({one.limit for one in alarms if abs(one.limit) <= _LARGEST})
        curves = {name: run.curve(measure, layer) for name, (run, layer) in lines.items()}
        return Panel(measure, curves, [one for one in alarms if one.new], limits)


def _distinct(split: Sequence[Sequence[str]]) -> list[Sequence[str]]:
    """Return the parts in which names differ."""
    before, after = _shared(split)
    return [parts[len(before) : len(parts) - len(after)] for parts in split]


def _shared(split: Sequence[Sequence[str]]) -> tuple[Sequence[str], Sequence[str]]:
    """Return the parts that names share at both ends."""
    most = min(map(len, split)) - 1  # every name keeps a part
    before = _alike(split)[:most]
    after = _alike([parts[::-1] for parts in split])[: most - len(before)][::-1]
    return before, after


def _alike(split: Sequence[Sequence[str]]) -> list[str]:
    return [parts[0] for parts in takewhile(lambda parts: len(set(parts)) == 1, zip(*split, strict=False))]


def _counted(count: int, word: str) -> str:
    return f"{count or 'no'} {word}{'s' * (count != 1)}"


def _decoded(line: Any) -> Record:
    """Make a record of a line's value. Raises ValueError, TypeError, KeyError or OverflowError."""
    if not isinstance(line, dict) or not {"step", "loss", "alarms", "layers"} <= line.keys():
        raise ValueError("it lacks step, loss, alarms or layers")
    step = line["step"]
    if type(step) is not int or abs(step) >= 2**63 or not isinstance(line["layers"], dict):
        raise ValueError("step is no number, or layers are no object")
    alarms = [Alarm(step, **one | {x: _number(one[x]) for x in ("value", "limit")}) for one in line["alarms"]]
    layers = {
        name: {one: _number(layer_value(one, measures[one] or ())) for one in MEASURES if one in measures}
        for name, measures in line["layers"].items()
    }
    return Record(step, _number(line["loss"]), alarms, layers)


def _number(x: Any) -> float:
    if x is not None and type(x) not in (int, float):
        raise ValueError(f"a value is no number: {str(x)[:40]}")
    return math.nan if x is None else float(x)
