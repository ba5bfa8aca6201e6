"""The pictures of the studies: `python -m docs.figures.studies` draws them anew from the records in docs/data."""

from __future__ import annotations

import json
from pathlib import Path

from tritonattn.lab.length.plot import draw as draw_length
from tritonattn.lab.simulation.plot import draw_all
from tritonattn.lab.simulation.report import Findings
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
    simulated = draw_all(Findings.read_json(DATA / "simulation.json"), folder / "simulation")
    return [*(folder / f"training-{task}.png" for task in TASKS), folder / "length.png", *simulated]


if __name__ == "__main__":
    for file in draw(FIGURES):
        print(file)
