"""The pictures of the studies: `python -m docs.figures.studies` draws them from the records in docs/data."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path

import torch
from matplotlib.figure import Figure

from perf.studies.length_study import figure_of as length
from perf.studies.train_compare.modes import MODES
from perf.studies.train_compare.plot import figure_of as training
from perf.studies.train_compare.records import read
from tritonattn.core.provenance import Environment
from tritonattn.lab.simulation.measures import Measures, Point
from tritonattn.lab.simulation.paper import PANELS, component
from tritonattn.lab.simulation.plot import figures_of as simulation
from tritonattn.lab.simulation.report import Findings
from tritonattn.lab.simulation.verdict import Condition, Reach

from .themes import save_themes

FIGURES = Path(__file__).resolve().parent
DATA = FIGURES.parent / "data"
TASKS = ("recall", "digits", "spell", "text")


def figures() -> Iterator[tuple[str, Figure]]:
    """Draw every picture, and yield it with its path in this folder."""
    for task in TASKS:
        runs = [run for run in read(DATA / f"training/runs-{task}.jsonl") if run.mode in MODES]
        yield f"training-{task}.png", training(runs)
    yield "length.png", length(json.loads((DATA / "length.json").read_text(encoding="utf-8")))
    for name, figure in simulation(simulated(DATA / "simulation.json")).items():
        yield f"simulation/{name}.png", figure


def simulated(file: Path) -> Findings:
    """Read the JSON of `tritonattn simulate`; the panels' components, which it leaves out, come from the seed."""
    record = json.loads(file.read_text(encoding="utf-8"))
    seed, paper = record["seed"], {(one.pop("dim"), one.pop("mode")): one for one in record["paper"]}
    sweep, verdict = {}, {}
    for one in record["sweep"]["points"]:
        modes = one.pop("modes")
        sweep[Point(**one)] = {mode: Measures(*values) for mode, values in modes.items()}
    for one in record["verdict"]:
        condition = Condition(**{field.name: one.pop(field.name) for field in fields(Condition)})
        mode = one.pop("mode")
        verdict.setdefault(condition, {})[mode] = Reach(**one)
    return Findings(
        Environment(**record["environment"]),
        record["command"],
        seed,
        paper,
        [component(panel, seed, torch.device("cpu")) for panel in PANELS] if paper else [],
        sweep,
        verdict,
    )


if __name__ == "__main__":
    for name, drawn in figures():
        print(*save_themes(drawn, FIGURES / name), sep="\n")
