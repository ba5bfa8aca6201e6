"""Scalings that depend on the head dim D alone, and one whose scales are a call's arguments."""

from __future__ import annotations

import torch
from torch import Tensor

from ..core.statistics import Statistics
from ..core.visibility import Visibility
from .base import Scales, Scaling, mode


@mode("sqrt_dim", "1/sqrt(D)", source="Vaswani 2017, arXiv:1706.03762", advice="the default; trained models expect it")
class SqrtDim(Scaling):
    """factor = 1 / sqrt(D): unit variance of the logits for independent, unit-variance q and k.

    Source: Vaswani et al. 2017, "Attention is all you need", arXiv:1706.03762, section 3.2.1.
    """

    def scales(self, q: Tensor, k: Tensor, visibility: Visibility, statistics: Statistics) -> Scales:
        return Scales(q.shape[-1] ** -0.5)

    def multiplier(self, q: Tensor, k: Tensor, visible: Tensor) -> Tensor:
        return 1 / torch.full((), k.shape[-1], dtype=torch.float64, device=k.device).sqrt()


@mode("dim", "1/D", source="muP: Yang 2022, arXiv:2203.03466", advice="for muP-initialised models")
class Dim(Scaling):
    """factor = 1 / D: keeps logits bounded as D grows when q and k are correlated, as after training.

    Source: Yang et al. 2022, "Tensor Programs V" (muP), arXiv:2203.03466, definition 4.1.
    """

    def scales(self, q: Tensor, k: Tensor, visibility: Visibility, statistics: Statistics) -> Scales:
        return Scales(1 / q.shape[-1])

    def multiplier(self, q: Tensor, k: Tensor, visible: Tensor) -> Tensor:
        return 1 / torch.full((), k.shape[-1], dtype=torch.float64, device=k.device)


@mode("none", "1", source="for q and k that are scaled already", advice="q, k that are scaled already")
class Unscaled(Scaling):
    """factor = 1: the logits are the dot products, for models that scale q themselves (T5, Gemma 3n)."""

    def scales(self, q: Tensor, k: Tensor, visibility: Visibility, statistics: Statistics) -> Scales:
        return Scales(1.0)

    def multiplier(self, q: Tensor, k: Tensor, visible: Tensor) -> Tensor:
        return torch.ones((), dtype=torch.float64, device=k.device)


class Given(Scaling):
    """A scaling whose scales are arguments."""

    name = "given"
    reads_keys = False

    def __init__(self, constant: float, query: Tensor | None = None, key: Tensor | None = None) -> None:
        self.given = Scales(constant, query, key)

    def scales(self, q: Tensor, k: Tensor, visibility: Visibility, statistics: Statistics) -> Scales:
        return self.given

    def multiplier(self, q: Tensor, k: Tensor, visible: Tensor) -> Tensor | float:
        factor, (query, key) = self.given.constant, (self.given.query, self.given.key)
        if query is not None:
            factor = factor * query[..., None]
        if key is not None:
            if key.dim() > 1 and key.shape[-2] > 1:
                key = key.repeat_interleave(k.shape[1] // key.shape[-2], dim=-2)  # one row per query head
            key = key[..., None, :] if key.dim() else key
            factor = factor * torch.where(visible, key, 0)  # that of a key which no row attends to may be NaN
        return factor
