"""The study's record: a JSON line for every model that was trained."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from tritonattn.core import records
from tritonattn.core.provenance import Environment

from .model import Factor, Shape
from .training import Cell, Outcome, Recipe

RECORD = Path(__file__).resolve().parents[2] / "results/language_model.jsonl"


@dataclass(frozen=True)
class Run:
    """One model: what was to be trained, by which code on which machine, and what was found."""

    cell: Cell
    found: Outcome
    environment: Environment
    date: str


def append(file: Path, run: Run) -> None:
    records.append(file, [asdict(run)], digits=5)


def read(file: Path = RECORD) -> list[Run]:
    return records.read(file, _decoded, "a run of `perf language-model`")


def _decoded(values: dict[str, Any]) -> Run:
    cell = values["cell"]
    shape = Shape(**cell["shape"] | {"factor": Factor(**cell["shape"]["factor"])})
    cell = Cell(**cell | {"shape": shape, "recipe": Recipe(**cell["recipe"])})
    return Run(cell, Outcome(**values["found"]), Environment(**values["environment"]), values["date"])
