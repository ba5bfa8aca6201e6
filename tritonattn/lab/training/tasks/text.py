"""A byte language model on a book in the public domain."""

from __future__ import annotations

from functools import cached_property

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...texts import WONDERLAND
from ..models import Attentions, LanguageModel, Sizes
from ..records import Recipe
from .base import Batch, Task

_BYTES = 128  # the book is plain ASCII


class Text(Task):
    """Predict bytes of Alice's Adventures in Wonderland from up to 128 before; the last tenth is held out.

    loss_<n>   nats a byte on the held-out tenth, at the last 64 positions of windows of n bytes, which all end alike:
               n = 128 as in training, and 256 and 512, with contexts longer than in training
    """

    name, metric, higher_is_better = "text", "loss_128", False
    target = 2.25
    sizes = Sizes(width=64, heads=4, blocks=2)
    recipe = Recipe("adamw", 5e-3, weight_decay=0.01, steps=200, batch=16)
    length = 128
    counted = 64

    @cached_property
    def bytes(self) -> tuple[Tensor, Tensor]:
        """int64: the training part, and the held-out tenth."""
        text = torch.tensor(list(WONDERLAND.read_bytes()))
        cut = text.shape[0] * 9 // 10
        return text[:cut], text[cut:]

    def model(self, attentions: Attentions) -> nn.Module:
        return LanguageModel(attentions, _BYTES, self.length)

    def batch(self, size: int, random: torch.Generator) -> Batch:
        train, _ = self.bytes
        starts = torch.randint(train.shape[0] - self.length, (size,), generator=random)
        return _shifted(train, starts, self.length)

    def held_out(self) -> Batch:
        _, held_out = self.bytes
        return _shifted(held_out, torch.linspace(0, held_out.shape[0] - self.length - 1, 16).long(), self.length)

    def final(self, model: nn.Module, device: torch.device, quick: bool) -> dict[str, float]:
        _, held_out = self.bytes
        ends = torch.arange(512, held_out.shape[0] - 1, 2 * self.counted)[: 8 if quick else None]
        return {f"loss_{n}": self._loss(model, held_out, ends, n, device) for n in (self.length, 256, 512)}

    def _loss(self, model: nn.Module, text: Tensor, ends: Tensor, length: int, device: torch.device) -> float:
        total = 0.0
        for some in ends.split(32):
            batch = _shifted(text, some - length, length).to(device)
            logits = model(**batch.inputs)[:, -self.counted :]
            target = batch.target[:, -self.counted :]
            total += float(F.cross_entropy(logits.flatten(0, 1), target.flatten(), reduction="sum"))
        return total / (ends.shape[0] * self.counted)


def _shifted(text: Tensor, starts: Tensor, length: int) -> Batch:
    windows = text[starts[:, None] + torch.arange(length + 1)]  # [B, length + 1]
    return Batch({"symbols": windows[:, :-1]}, windows[:, 1:])
