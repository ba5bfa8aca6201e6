"""The pictures of the studies: `python -m docs.figures.studies` draws them anew from the records in docs/data."""

from __future__ import annotations

import json
from dataclasses import fields
from pathlib import Path

import torch

from tritonattn.core.provenance import Environment
from tritonattn.lab.length.report import draw as draw_length
from tritonattn.lab.simulation.measures import Measures, Point
from tritonattn.lab.simulation.paper import PANELS, component
from tritonattn.lab.simulation.plot import draw_all
from tritonattn.lab.simulation.report import Findings
from tritonattn.lab.simulation.verdict import Condition, Reach
from tritonattn.lab.training.modes import MODES
from tritonattn.lab.training.plot import draw as draw_training
from tritonattn.lab.training.records import read

FIGURES = Path(__file__).resolve().parent
DATA = FIGURES.parent / "data"
TASKS = ("recall", "digits", "spell", "text")


def draw(folder: Path) -> list[Path]:
    """Draw every picture into a folder, and return the paths."""
    for task in TASKS:
        runs = [run for run in read(DATA / f"training/runs-{task}.jsonl") if run.mode in MODES]
        draw_training(runs, folder / f"training-{task}.png")
    draw_length(json.loads((DATA / "length.json").read_text(encoding="utf-8")), folder / "length.png")
    (folder / "simulation").mkdir(exist_ok=True)
    pictures = draw_all(simulated(DATA / "simulation.json"), folder / "simulation")
    return [*(folder / f"training-{task}.png" for task in TASKS), folder / "length.png", *pictures]


def simulated(file: Path) -> Findings:
    """Read the JSON of `tritonattn simulate`; the panels' components, which it leaves out, come from the seed."""
    record = json.loads(file.read_text(encoding="utf-8"))
    seed, paper = record["seed"], {(one.pop("dim"), one.pop("mode")): one for one in record["paper"]}
    points = [(one.pop("modes"), Point(**one)) for one in record["sweep"]["points"]]
    verdict = {}
    for one in record["verdict"]:
        condition = Condition(**{field.name: one.pop(field.name) for field in fields(Condition)})
        mode = one.pop("mode")
        verdict[condition, mode] = Reach(**one)
    return Findings(
        Environment(**record["environment"]),
        record["command"],
        seed,
        paper,
        [component(panel, seed, torch.device("cpu")) for panel in PANELS] if paper else [],
        {(point, mode): Measures(*values) for modes, point in points for mode, values in modes.items()},
        verdict,
    )


if __name__ == "__main__":
    for file in draw(FIGURES):
        print(file)
