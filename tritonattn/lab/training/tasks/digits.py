"""A vision transformer on handwritten digits."""

from __future__ import annotations

from functools import cached_property

import torch
from torch import Tensor, nn

from ..models import Attentions, ImageClassifier, Sizes
from ..records import Recipe
from .base import Batch, Task


class Digits(Task):
    """Classes of scikit-learn's 1,797 digits of 8 x 8 pixels, 16 patches each; every fourth is held out.

    accuracy   on the held-out quarter
    """

    name, metric = "digits", "accuracy"
    target = 0.5
    sizes = Sizes(width=32, heads=2, blocks=2)
    recipe = Recipe("adamw", 1e-2, weight_decay=0.01, steps=300, batch=64)

    @cached_property
    def parts(self) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
        """(images [N, 8, 8] from 0 to 1, classes [N]) of the training part and of the held-out one."""
        from sklearn.datasets import load_digits

        images, classes = load_digits(return_X_y=True)
        x = torch.tensor(images, dtype=torch.float32).unflatten(1, (8, 8)) / 16
        y = torch.tensor(classes, dtype=torch.int64)
        out = torch.arange(x.shape[0]) % 4 == 3
        return (x[~out], y[~out]), (x[out], y[out])

    def model(self, attentions: Attentions) -> nn.Module:
        return ImageClassifier(attentions, side=8, patch=2, classes=10)

    def batch(self, size: int, random: torch.Generator) -> Batch:
        (images, classes), _ = self.parts
        chosen = torch.randint(images.shape[0], (size,), generator=random)
        return Batch({"images": images[chosen]}, classes[chosen])

    def held_out(self) -> Batch:
        _, (images, classes) = self.parts
        return Batch({"images": images}, classes)

    def final(self, model: nn.Module, device: torch.device, quick: bool) -> dict[str, float]:
        batch = self.held_out().to(device)
        right = model(**batch.inputs).argmax(-1) == batch.target
        return {"accuracy": float(right.double().mean())}
