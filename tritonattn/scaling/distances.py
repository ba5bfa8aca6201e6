"""Factors of the distance from a key to the row's position."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..core.hints import hinted
from ..core.statistics import Statistics
from ..core.visibility import Visibility
from .base import Scales, Scaling, check_positive, mode


@mode(
    "scale_invariant",
    "sqrt(1 + 2 ln(1 + t/10))/sqrt(D)",
    addend="-2 ln(1 + t/10)",
    source="Anson 2025, arXiv:2505.17083",
    advice="for layers over all keys; keeps near tokens in view at any length",
    example={"tau": 2.0},
)
@hinted
@dataclass(frozen=True)
class ScaleInvariant(Scaling):
    """factor = a(t) / sqrt(D), and a bias m(t), of the distance t from the key to the row's position.

        a(t) = sqrt(2 ln(t / tau + 1) + 1)        m(t) = -2 ln(t / tau + 1)        t = abs(position - j)

    For logits before it that are normal of variance 1, exp(logit) at distance t has the mean sqrt(e) / (t / tau + 1):
    ranges of distances of one ratio, as 10 to 100 and 100 to 1,000, get the same weight in all, and the same entropy.

    tau   the distance up to which attention is nearly as without, 10 in the paper

    The paper has causal attention; keys behind the row count by their distance, too. Tables of fp32, one number a
    distance, go with each call.

    Source: Anson, Wang & Aitchison 2025, "Scale-invariant attention", arXiv:2505.17083.
    Raises ValueError unless tau is finite and above 0.
    """

    tau: float = 10.0

    def __post_init__(self) -> None:
        check_positive("tau", self.tau)

    def scales(self, q: Tensor, k: Tensor, visibility: Visibility, statistics: Statistics) -> Scales:
        rows, keys = visibility.q_len, visibility.k_len
        if visibility.sequences is not None:
            rows, keys = visibility.sequences.longest_q, visibility.sequences.longest_k
        later, dtype = 0 if visibility.right == 0 else max(rows - 1, 0), torch.promote_types(q.dtype, torch.float32)
        distance = torch.arange(-later, max(keys, 1), device=q.device).abs()
        logarithm = torch.log1p(distance.double() / self.tau)
        of_distance, bias = (1 + 2 * logarithm).sqrt(), -2 * logarithm
        relative, relative_bias = (x.to(dtype).view(1, 1, 1, -1) for x in (of_distance, bias))
        return Scales(q.shape[-1] ** -0.5, relative=relative, relative_bias=relative_bias, relative_right=later)

    def multiplier(self, q: Tensor, k: Tensor, visible: Tensor) -> Tensor:
        return torch.tensor(k.shape[-1] ** -0.5, dtype=torch.float64, device=k.device)

    def relative_multiplier(self, q: Tensor, k: Tensor, distance: Tensor) -> Tensor:
        return (2 * self._logarithm(distance) + 1).sqrt()

    def relative_addend(self, q: Tensor, k: Tensor, distance: Tensor) -> Tensor:
        return -2 * self._logarithm(distance)

    def _logarithm(self, distance: Tensor) -> Tensor:
        return (distance.abs().double() / self.tau + 1).log()
