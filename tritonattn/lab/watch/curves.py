"""The records of a Monitor as curves over steps."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import takewhile
from pathlib import Path
from typing import Any

from ...analysis.alarms import LOSS, layer_value
from ...core import records
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
Points = list[tuple[int, float | None]]
_SMALLEST, _LARGEST = 1e-45, 3.5e38  # of fp32: an axis cannot hold fp64's


@dataclass(frozen=True)
class Mark:
    """An alarm in a step.

    layer   "" for the loss
    value   None if it was not finite
    limit   None for the loss
    new     whether it began in this step
    """

    step: int
    layer: str
    measure: str
    value: float | None
    limit: float | None
    new: bool

    def __str__(self) -> str:
        value = "not finite" if self.value is None else f"{self.value:.4g}"
        limit = "" if self.limit is None else f", threshold {self.limit:g}"
        return f"step {self.step}: {self.layer or 'the model'}: {self.measure} {value}{limit}"


@dataclass(frozen=True)
class Record:
    """A watched step: the loss, and by layer each measure as thresholds see it, None where there is none."""

    step: int
    loss: float | None
    alarms: list[Mark]
    layers: dict[str, dict[str, float | None]]


@dataclass(frozen=True)
class Panel:
    """One measure: a curve a layer, None where it is interrupted; its alarms where they begin, and all their limits."""

    measure: str
    curves: dict[str, Points]
    alarms: list[Mark]
    limits: list[float]

    @property
    def title(self) -> str:
        return MEASURES[self.measure][0]

    @property
    def axis(self) -> str:
        return MEASURES[self.measure][1]

    @property
    def logarithmic(self) -> bool:
        return _is_logarithmic(self.measure)

    def values(self) -> list[float]:
        """Every number that is drawn."""
        of_curves = [value for points in self.curves.values() for _, value in points if value is not None]
        return of_curves + self.limits


@dataclass(frozen=True)
class Watched:
    """A file's records."""

    name: str
    records: list[Record]

    @classmethod
    def read(cls, file: Path) -> Watched:
        """Read a file; torn lines are named on stderr and skipped. Raises CommandError if it has no record."""
        try:
            lines = file.read_text(encoding="utf-8-sig").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            why = error.strerror if isinstance(error, OSError) else "it is no text"
            raise CommandError(f"FILE: expected JSON lines that a Monitor wrote, got {str(file)!r}: {why}") from error
        if not lines:
            raise CommandError(f"FILE: expected at least one record of a Monitor, got {str(file)!r}, which is empty")
        if all(_refused(line) for line in lines):
            got = f"{str(file)!r}, whose first line is none: {_refused(lines[0])}"
            raise CommandError(f"FILE: expected JSON lines that a Monitor wrote, got {got}")
        watched = cls(file.name, records.read(file, _decoded, "a record of a Monitor"))
        if not watched.panels:
            raise CommandError(f"FILE: expected a loss or a layer's measure in a record, got none in {str(file)!r}")
        return watched

    @cached_property
    def layers(self) -> list[str]:
        """The layers' names, in the order in which they ran."""
        return list(dict.fromkeys(name for record in self.records for name in record.layers))

    @property
    def alarms(self) -> list[Mark]:
        """The alarms, each in the step in which it begins."""
        return [one for record in self.records for one in record.alarms if one.new]

    @cached_property
    def panels(self) -> list[Panel]:
        """One panel a measure, without those that were never recorded."""
        panels = [self._panel(measure) for measure in MEASURES]
        return [panel for panel in panels if panel.values() or panel.alarms]

    def latest(self) -> dict[str, dict[str, float | None]]:
        """The measures of the last step in which layers were watched."""
        return next((record.layers for record in reversed(self.records) if record.layers), {})

    def summary(self) -> str:
        """One line: how many records, layers and alarms, and which steps."""
        steps, layers = [record.step for record in self.records], self.layers
        names = f" ({pattern(layers)})" if len(layers) > 1 else ""
        return (
            f"{self.name}: {_counted(self.records, 'record')} of {_counted(layers, 'layer')}{names}, "
            f"steps {min(steps)} to {max(steps)}, {_counted(self.alarms, 'alarm')}"
        )

    def _curves(self, measure: str) -> dict[str, Points]:
        log = _is_logarithmic(measure)
        curves: dict[str, Points] = {}
        for name in [""] if measure == LOSS else self.layers:
            points: Points = []
            for record in self.records:
                if measure != LOSS and not record.layers:
                    continue
                value = record.loss if measure == LOSS else record.layers.get(name, {}).get(measure)
                if points and record.step <= points[-1][0]:  # a later run, or one that went back to a checkpoint
                    points.append((record.step, None))
                points.append((record.step, value if _fits_axis(value, log) else None))
            curves[name] = points
        return curves

    def _panel(self, measure: str) -> Panel:
        standing = [one for record in self.records for one in record.alarms if one.measure == measure]
        limits = sorted({one.limit for one in standing if one.limit is not None and _fits_axis(one.limit, False)})
        return Panel(measure, self._curves(measure), [one for one in standing if one.new], limits)


def _is_logarithmic(measure: str) -> bool:
    return MEASURES[measure][1] in ("norm", "variance")


def _fits_axis(value: float | None, log: bool) -> bool:
    return value is not None and abs(value) <= _LARGEST and (value >= _SMALLEST or not log)


def pattern(names: list[str]) -> str:
    """The parts that dotted names share at both ends around a star: model.layers.*.self_attn."""
    before, after = _shared(names)
    return ".".join([*before, "*", *after])


def short_names(names: list[str]) -> dict[str, str]:
    """The parts in which dotted names differ: a layer's number, as a rule."""
    if len(names) < 2:
        return {name: name for name in names}
    before, after = _shared(names)
    return {name: ".".join(name.split(".")[len(before) : len(name.split(".")) - len(after)]) for name in names}


def _shared(names: list[str]) -> tuple[list[str], list[str]]:
    split = [name.split(".") for name in names]
    most = min(map(len, split)) - 1  # every name keeps a part
    before = _alike(split)[:most]
    after = _alike([parts[::-1] for parts in split])[: most - len(before)][::-1]
    return before, after


def _alike(split: list[list[str]]) -> list[str]:
    return [parts[0] for parts in takewhile(lambda parts: len(set(parts)) == 1, zip(*split, strict=False))]


def _counted(things: Sequence[Any], word: str) -> str:
    count = len(things)
    return f"{count or 'no'} {word}{'s' * (count != 1)}"


def _refused(line: str) -> str | None:
    """Why a line is no record; None if it is one."""
    try:
        _decoded(json.loads(line))
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        return str(error)
    return None


def _decoded(line: Any) -> Record:
    """Make a record of a line's value. Raises ValueError, TypeError or KeyError."""
    if not isinstance(line, dict) or not {"step", "loss", "alarms", "layers"} <= line.keys():
        raise ValueError("it lacks step, loss, alarms or layers")
    if type(line["step"]) is not int or abs(line["step"]) >= 2**63 or not isinstance(line["layers"], dict):
        raise ValueError("step is no number, or layers are no object")
    alarms = [Mark(step=line["step"], **one) for one in line["alarms"]]
    for number in [line["loss"], *(x for one in alarms for x in (one.value, one.limit))]:
        _check_number(number)
    layers = {
        name: {measure: layer_value(measure, measures[measure] or ()) for measure in MEASURES if measure in measures}
        for name, measures in line["layers"].items()
    }
    for number in (x for measures in layers.values() for x in measures.values()):
        _check_number(number)
    return Record(line["step"], line["loss"], alarms, layers)


def _check_number(x: Any) -> None:
    if x is not None and type(x) is not float and (type(x) is not int or abs(x) >= 2**1023):
        raise ValueError(f"a value is no number: {str(x)[:40]}")
