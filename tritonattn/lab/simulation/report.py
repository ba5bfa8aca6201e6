"""A simulation as tables and as JSON."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch

from ...core.provenance import Environment
from ...core.records import for_json, write
from ...core.tables import table
from .measures import MEASURES, Measures, Point
from .paper import PANELS, Component, component
from .verdict import Condition, Reach

_REFERENCE = 1024  # dimensions and kinds of keys are compared at this number of keys, or the nearest
BY_COUNT = ("logit_std", "max_probability", "relative_entropy", "output_variance", "jacobian_norm", "gradient_norm")
BY_DIM = ("relative_entropy", "gradient_norm")
BY_KEYS = ("max_probability", "relative_entropy", "q_gradient")
TITLES = {
    "logit_std": "standard deviation of the logits",
    "max_probability": "max probability",
    "relative_entropy": "entropy / ln n",
    "output_variance": "variance of the softmax's output",
    "jacobian_norm": "Frobenius norm of the softmax's Jacobian",
    "gradient_norm": "gradient that reaches q.k: Jacobian times factor",
    "q_gradient": "gradient that reaches a row of q",
}
VERDICT = {
    "as_published": "Reach, the mean share of the largest gradient that a row could have, of a mode as published",
    "near_uniform": "Share of nearly uniform rows, as published",
    "gain": "The one gain for all rows with the largest reach",
    "tuned": "Reach with that gain",
    "unevenness": "Unevenness: standard deviation over the rows of ln(standard deviation of a row's logits)",
}


@dataclass(frozen=True)
class Findings:
    """The figures of a simulation; parts that were not run are empty.

    paper        of (dimension, mode): measures by name
    components   the values of each panel of the paper's figures
    sweep        of (point, mode)
    verdict      of (condition, mode)
    """

    environment: Environment
    command: str
    seed: int
    paper: dict[tuple[int, str], dict[str, float]]
    components: list[Component]
    sweep: dict[tuple[Point, str], Measures]
    verdict: dict[tuple[Condition, str], Reach]

    @classmethod
    def read_json(cls, file: Path) -> Findings:
        """Read what `write_json` wrote; the panels' components, which it leaves out, are drawn anew from the seed."""
        record = json.loads(file.read_text(encoding="utf-8"))
        seed, paper = record["seed"], {(one.pop("dim"), one.pop("mode")): one for one in record["paper"]}
        points = [(one.pop("modes"), Point(**one)) for one in record["sweep"]["points"]]
        verdict = {}
        for one in record["verdict"]:
            condition = Condition(**{field.name: one.pop(field.name) for field in fields(Condition)})
            mode = one.pop("mode")
            verdict[condition, mode] = Reach(**one)
        return cls(
            Environment(**record["environment"]),
            record["command"],
            seed,
            paper,
            [component(panel, seed, torch.device("cpu")) for panel in PANELS] if paper else [],
            {(point, mode): Measures(*values) for modes, point in points for mode, values in modes.items()},
            verdict,
        )

    def source(self) -> str:
        """Say where the figures come from."""
        return f"Simulated: {self.environment}, seed {self.seed}, `{self.command}`"

    @property
    def modes(self) -> list[str]:
        return _unique(mode for _, mode in (*self.sweep, *self.verdict))

    @property
    def points(self) -> list[Point]:
        return _unique(point for point, _ in self.sweep)

    @property
    def conditions(self) -> list[Condition]:
        return _unique(condition for condition, _ in self.verdict)

    def by_count(self) -> list[Point]:
        """Select the points that differ from the first in their number of keys only."""
        first = self.points[0]
        return [point for point in self.points if (point.keys, point.dim) == (first.keys, first.dim)]

    def by_dim(self) -> list[Point]:
        return [point for point in self._at_reference() if point.keys == self.points[0].keys]

    def by_keys(self) -> list[Point]:
        return [point for point in self._at_reference() if point.dim == self.points[0].dim]

    def value(self, point: Point, mode: str, measure: str) -> float:
        return getattr(self.sweep[point, mode], measure)

    def _at_reference(self) -> list[Point]:
        counts = _unique(point.count for point in self.points)
        nearest = min(counts, key=lambda count: abs(math.log(count / _REFERENCE)))
        return [point for point in self.points if point.count == nearest]

    def text(self) -> str:
        """Write all tables."""
        parts = []
        if self.paper:
            parts += [self._paper_table(), self._component_table()]
        if self.sweep:
            parts += self._sweep_tables()
        if self.verdict:
            parts += self._verdict_tables()
        return "\n\n".join(parts)

    def write_json(self, file: Path) -> None:
        """Write every figure to four digits; one that is not finite becomes null."""
        sweep = [
            {**asdict(point), "modes": {mode: list(asdict(self.sweep[point, mode]).values()) for mode in self.modes}}
            for point in self.points
        ]
        record = {
            "command": self.command,
            "environment": asdict(self.environment),
            "seed": self.seed,
            "paper": [{"dim": dim, "mode": mode, **values} for (dim, mode), values in self.paper.items()],
            "sweep": {"measures": MEASURES, "points": sweep},
            "verdict": [
                {**asdict(condition), "mode": mode, **asdict(reach)}
                for (condition, mode), reach in self.verdict.items()
            ],
        }
        text = json.dumps(for_json(record, 4), allow_nan=False)
        for opening in ('{"keys"', '{"dim"', '{"name"'):  # one record a line, for readable diffs
            text = text.replace(opening, f"\n{opening}")
        write(file, f"{text}\n")

    def _paper_table(self) -> str:
        names = list(next(iter(self.paper.values())))
        rows = [[dim, mode, *(values[name] for name in names)] for (dim, mode), values in self.paper.items()]
        title = f"The paper's simulation: 32 keys, 500 queries, standard normal components, seed {self.seed}"
        return _table(title, ["d", "scaling", *map(_header, names)], rows, left=2)

    def _component_table(self) -> str:
        rows = [
            (
                f"{part.panel.figure}{part.panel.letter}",
                part.panel.dim,
                part.panel.title,
                *(float(x) for values in (part.values, part.as_published) for x in (values.mean(), values.std())),
            )
            for part in self.components
        ]
        title = "Its figures: the value of key 1 over the queries, and in the published package's column 1"
        return _table(
            title, ["figure", "d", "values", "mean", "std", "mean as\npublished", "std as\npublished"], rows, left=3
        )

    def _sweep_tables(self) -> list[str]:
        first = self.points[0]
        axes: tuple[tuple[str, list[Point], Callable[[Point], Any], tuple[str, ...]], ...] = (
            (f"by number of keys; {first.keys} keys, d = {first.dim}", self.by_count(), lambda x: x.count, BY_COUNT),
            (f"by dimension; {first.keys} keys, n = {self.by_dim()[0].count}", self.by_dim(), lambda x: x.dim, BY_DIM),
            (
                f"by kind of keys; n = {self.by_keys()[0].count}, d = {first.dim}",
                self.by_keys(),
                lambda x: x.keys.replace(" ", "\n"),
                BY_KEYS,
            ),
        )
        tables = []
        for title, points, name, measures in axes:
            for measure in measures if measures is BY_COUNT or len(points) > 1 else ():
                rows = [[mode, *(self.value(point, mode, measure) for point in points)] for mode in self.modes]
                tables.append(_table(f"{TITLES[measure]}, {title}", ["scaling", *map(name, points)], rows))
        return tables

    def _verdict_tables(self) -> list[str]:
        tables = []
        for name, title in VERDICT.items():
            rows = [
                [mode, *(getattr(self.verdict[condition, mode], name) for condition in self.conditions)]
                for mode in self.modes
            ]
            headers = [condition.name.replace(" ", "\n") for condition in self.conditions]
            tables.append(_table(title, ["scaling", *headers], rows))
        return tables


def _table(title: str, headers: list[Any], rows: Iterable[Iterable[Any]], left: int = 1) -> str:
    cells = [[f"{x:.3g}" if isinstance(x, float) else x for x in row] for row in rows]
    return f"{title}\n\n{table(cells, headers, 'simple', left)}"


def _header(name: str) -> str:
    return name.replace("_", "\n")


def _unique(items: Iterable[Any]) -> list[Any]:
    return list(dict.fromkeys(items))
