"""The scaling that a call's numbers and vectors are."""

from __future__ import annotations

import torch
from torch import Tensor

from ..core.statistics import Statistics
from ..core.visibility import Visibility
from .base import Scales, Scaling


class Given(Scaling):
    """A scaling whose scales are arguments."""

    name = "given"
    reads_keys = False

    def __init__(self, constant: float, query: Tensor | None = None, key: Tensor | None = None) -> None:
        self._scales = Scales(constant, query, key)

    def scales(self, q: Tensor, k: Tensor, visibility: Visibility, statistics: Statistics) -> Scales:
        return self._scales

    def multiplier(self, q: Tensor, k: Tensor, visible: Tensor) -> Tensor | float:
        factor, (query, key) = self._scales.constant, (self._scales.query, self._scales.key)
        if query is not None:
            factor = factor * query[..., None]
        if key is not None:
            if key.dim() > 1 and key.shape[-2] > 1:
                key = key.repeat_interleave(k.shape[1] // key.shape[-2], dim=-2)  # one row a query head
            key = key[..., None, :] if key.dim() else key
            factor = factor * torch.where(visible, key, 0)  # that of a key which no row attends to may be NaN
        return factor
