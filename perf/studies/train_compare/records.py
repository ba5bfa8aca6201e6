"""Training runs, which a command appends as JSON lines when they end."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tritonattn.core import records
from tritonattn.core.provenance import Environment


@dataclass(frozen=True)
class Recipe:
    """The training of a run: optimizer "adamw", or "sgd" with a momentum of 0.9."""

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


@dataclass
class Run:
    """One training run: what is to be trained, and what `trainer.train` found.

    mode              of the attention layers, as `modes.build` takes it, or TRAINED:TESTED, two of these
    seed              sets the weights and the order of the data, neither of which depends on the mode
    head_dim          of the attention layers; None is the task's default
    date              the day on which the command began
    status            "trained", or "diverged" where a loss was not finite: then without metrics
    data              digest of all its training batches: the same for every mode of a seed
    steps             of the entries of the lists below
    train_loss        mean since the step before
    gradients         norms by layer and part, at the step: see `trainer.gradient_norms`
    entropy           entropy / ln n by layer, on the held-out batch
    steps_to_target   the first of `steps` with a held-out loss of at most the task's target
    scaling           by layer, the scaling's parameters at the end, a value per head
    """

    task: str
    mode: str
    seed: int
    recipe: Recipe
    environment: Environment
    command: str
    date: str
    status: str = "trained"
    quick: bool = False
    qk_norm: bool = False
    head_dim: int | None = None
    data: str = ""
    seconds: float = 0.0
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
        return self.subject, self.mode, self.seed, self.recipe, self.quick, self.environment

    @property
    def subject(self) -> str:
        """The task and the choices of its model, such as "recall, QK-norm, heads of 32"."""
        heads = "" if self.head_dim is None else f", heads of {self.head_dim}"
        return self.task + ", QK-norm" * self.qk_norm + heads


def read(file: Path) -> list[Run]:
    """Read the runs of a file; other lines are named on stderr and skipped."""
    return records.read(file, _decoded, "a run of `python -m perf train-compare`")


def _decoded(values: dict[str, Any]) -> Run:
    parts = {"environment": Environment(**values["environment"]), "recipe": Recipe(**values["recipe"])}
    return Run(**values | parts)


def grouped(runs: Iterable[Run], key: Callable[[Run], Any]) -> dict[Any, list[Run]]:
    """Group runs, in the order in which their keys appear."""
    found: dict[Any, list[Run]] = {}
    for run in runs:
        found.setdefault(key(run), []).append(run)
    return found
