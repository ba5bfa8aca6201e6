"""Files of training runs: one run a line, as JSON, appended as soon as it has ended."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict, dataclass, field
from pathlib import Path

from ...core.provenance import Environment, for_json


@dataclass(frozen=True)
class Recipe:
    """How a run is trained: optimizer "adamw", or "sgd" with a momentum of 0.9."""

    optimizer: str
    learning_rate: float
    weight_decay: float
    steps: int
    batch: int

    def __str__(self) -> str:
        return (
            f"{self.optimizer}, learning rate {self.learning_rate:g}, weight decay {self.weight_decay:g}, "
            f"{self.steps} steps of {self.batch}"
        )


@dataclass(frozen=True)
class Run:
    """One training run.

    status            "trained", or "diverged" where a loss was not finite: then without metrics
    data              digest of all its training batches: the same for every mode of a seed
    steps             at which the lists below were taken
    train_loss        mean since the step before
    held_out_loss     at the step
    gradients         norms by layer and part, at the step: see `observe.gradient_norms`
    entropy           entropy / ln n by layer, on the held-out batch
    steps_to_target   the first of `steps` with a held-out loss of at most the task's target
    scaling           by layer, the scaling's parameters at the end, a value a head
    """

    task: str
    mode: str
    seed: int
    recipe: Recipe
    environment: Environment
    command: str
    date: str
    status: str
    quick: bool
    data: str
    seconds: float
    steps: list[int] = field(default_factory=list)
    train_loss: list[float] = field(default_factory=list)
    held_out_loss: list[float] = field(default_factory=list)
    gradients: dict[str, list[float]] = field(default_factory=dict)
    entropy: dict[str, list[float]] = field(default_factory=dict)
    steps_to_target: int | None = None
    metrics: dict[str, float] = field(default_factory=dict)
    scaling: dict[str, dict[str, list[float]]] = field(default_factory=dict)

    @property
    def key(self) -> tuple:
        return self.task, self.mode, self.seed, self.recipe, self.quick, self.environment


class RunsFile:
    """The runs of a file, and those appended to it."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._runs = {run.key: run for run in read(path)} if path.exists() else {}

    def get(self, key: tuple) -> Run | None:
        return self._runs.get(key)

    def append(self, run: Run) -> None:
        self._runs[run.key] = run
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a+b") as file:
            file.seek(max(0, file.seek(0, 2) - 1))
            torn = file.read() not in (b"", b"\n")  # by a run that was killed while it wrote
            file.write(("\n" * torn + line(run)).encode())


def line(run: Run) -> str:
    return json.dumps(for_json(asdict(run), 5), allow_nan=False) + "\n"


def read(path: Path) -> list[Run]:
    """The runs of a file; a line that is none is named on stderr and skipped."""
    runs = []
    for number, text in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        try:
            values = json.loads(text)
            values["environment"] = Environment(**values["environment"])
            values["recipe"] = Recipe(**values["recipe"])
            runs.append(Run(**values))
        except (ValueError, TypeError, KeyError) as error:
            print(f"{path}:{number}: expected a run of `tritonattn train-compare`, skipped: {error}", file=sys.stderr)
    return runs
