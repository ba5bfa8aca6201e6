"""A simulation as tables and as JSON."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from tabulate import tabulate

from ...core.provenance import Environment
from ...core.records import FIGURES, for_json, write
from .measures import MEASURES, Measures, Point
from .paper import Component
from .verdict import Condition, Reach

_REFERENCE = 1024  # dimensions and distributions are compared at this number of keys, or the nearest
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

    paper        by dimension and mode: measures by name
    components   the values of each panel of the paper's figures
    sweep        by point and mode
    verdict      by condition and mode
    """

    environment: Environment
    command: str
    seed: int
    paper: dict[tuple[int, str], dict[str, float]]
    components: list[Component]
    sweep: dict[Point, dict[str, Measures]]
    verdict: dict[Condition, dict[str, Reach]]

    def source(self) -> str:
        """Say where the figures come from."""
        return f"Simulated: {self.environment}, seed {self.seed}, `{self.command}`"

    @property
    def modes(self) -> list[str]:
        return list(next(iter([*self.sweep.values(), *self.verdict.values()]), {}))

    def along(self, axis: str) -> list[Point]:
        """Select the points that differ in "count", "dim" or "keys" only.

        The others are those of the first point, but the count, for other axes, is the nearest to 1,024.
        """
        first = next(iter(self.sweep))
        nearest = min((point.count for point in self.sweep), key=lambda count: abs(math.log(count / _REFERENCE)))
        fixed = {"keys": first.keys, "dim": first.dim, "count": nearest}
        del fixed[axis]
        return [point for point in self.sweep if fixed.items() <= vars(point).items()]

    def value(self, point: Point, mode: str, measure: str) -> float:
        return getattr(self.sweep[point][mode], measure)

    def text(self) -> str:
        """Write all tables."""
        parts = []
        if self.paper:
            parts += [self._paper_table(), self._component_table()]
        if self.sweep:
            parts += self._sweep_tables()
        headers = ["scaling", *(condition.name.replace(" ", "\n") for condition in self.verdict)]
        for name, title in VERDICT.items() if self.verdict else ():
            found = {mode: [getattr(reaches[mode], name) for reaches in self.verdict.values()] for mode in self.modes}
            parts.append(_table(title, headers, [[mode, *values] for mode, values in found.items()]))
        return "\n\n".join(parts)

    def _paper_table(self) -> str:
        names = list(next(iter(self.paper.values())))
        rows = [[dim, mode, *(values[name] for name in names)] for (dim, mode), values in self.paper.items()]
        title = f"The paper's simulation: 32 keys, 500 queries, standard normal components, seed {self.seed}"
        return _table(title, ["d", "scaling", *(name.replace("_", "\n") for name in names)], rows, left=2)

    def _component_table(self) -> str:
        rows = []
        for part in self.components:
            numbers = (float(f(x)) for x in (part.values, part.as_published) for f in (torch.mean, torch.std))
            rows.append((f"{part.panel.figure}{part.panel.letter}", part.panel.dim, part.panel.title, *numbers))
        title = "Its figures: the value of key 1 over the queries, and in the published package's column 1"
        headers = ["figure", "d", "values", "mean", "std", "mean as\npublished", "std as\npublished"]
        return _table(title, headers, rows, left=3)

    def _sweep_tables(self) -> list[str]:
        first, dims, keys = next(iter(self.sweep)), self.along("dim"), self.along("keys")
        axes = {
            "count": (f"by number of keys; {first.keys} keys, d = {first.dim}", BY_COUNT),
            "dim": (f"by dimension; {first.keys} keys, n = {dims[0].count}", BY_DIM if len(dims) > 1 else ()),
            "keys": (
                f"by distribution of keys; n = {keys[0].count}, d = {first.dim}",
                BY_KEYS if len(keys) > 1 else (),
            ),
        }
        tables = []
        for axis, (title, measures) in axes.items():
            points = self.along(axis)
            headers = ["scaling", *(str(getattr(point, axis)).replace(" ", "\n") for point in points)]
            for name in measures:
                rows = [[mode, *(self.value(point, mode, name) for point in points)] for mode in self.modes]
                tables.append(_table(f"{TITLES[name]}, {title}", headers, rows))
        return tables

    def write_json(self, file: Path) -> None:
        """Write every figure to four digits; one that is not finite becomes null."""
        sweep = [
            {**asdict(point), "modes": {mode: list(asdict(found).values()) for mode, found in by_mode.items()}}
            for point, by_mode in self.sweep.items()
        ]
        record = {
            "command": self.command,
            "environment": asdict(self.environment),
            "seed": self.seed,
            "paper": [{"dim": dim, "mode": mode, **values} for (dim, mode), values in self.paper.items()],
            "sweep": {"measures": MEASURES, "points": sweep},
            "verdict": [
                {**asdict(condition), "mode": mode, **asdict(reach)}
                for condition, by_mode in self.verdict.items()
                for mode, reach in by_mode.items()
            ],
        }
        text = json.dumps(for_json(record, 4), allow_nan=False)
        for opening in ('{"keys"', '{"dim"', '{"name"'):  # one record per line, for readable diffs
            text = text.replace(opening, f"\n{opening}")
        write(file, f"{text}\n")


def _table(title: str, headers: list[Any], rows: Iterable[Iterable[Any]], left: int = 1) -> str:
    cells = [[f"{x:.3g}" if isinstance(x, float) else x for x in row] for row in rows]
    sides: dict[str, Any] = FIGURES | {"colalign": ("left",) * left}
    return f"{title}\n\n{tabulate(cells, headers, 'simple', **sides)}"
