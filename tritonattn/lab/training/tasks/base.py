"""The interface of a task."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..models import Attentions, Sizes
from ..records import Recipe

IGNORED = -100


@dataclass(frozen=True)
class Batch:
    """A model's arguments, and the right classes; IGNORED ones do not count."""

    inputs: dict[str, Tensor]
    target: Tensor

    def to(self, device: torch.device) -> Batch:
        return Batch({name: x.to(device) for name, x in self.inputs.items()}, self.target.to(device))


class Task(ABC):
    """A model, its data, and its measures.

    metric    the measure of `final` that decides, higher_is_better or not
    target    a held-out loss; the steps until it is reached are counted
    recipe    the default training
    """

    name: str
    metric: str
    higher_is_better = True
    target: float
    sizes: Sizes
    recipe: Recipe

    @abstractmethod
    def model(self, attentions: Attentions) -> nn.Module: ...

    @abstractmethod
    def batch(self, size: int, random: torch.Generator) -> Batch:
        """Draw a batch of the training part; it depends on random only."""

    @abstractmethod
    def held_out(self) -> Batch:
        """Return the held-out batch, the same for every mode and seed, with nothing of a training batch."""

    @abstractmethod
    def final(self, model: nn.Module, device: torch.device, quick: bool) -> dict[str, float]:
        """Measure a trained model: `metric` and others by name; where quick, on less data."""


def loss_of(logits: Tensor, target: Tensor) -> Tensor:
    """Compute the mean cross entropy, in nats."""
    return F.cross_entropy(logits.flatten(0, -2), target.flatten(), ignore_index=IGNORED)
