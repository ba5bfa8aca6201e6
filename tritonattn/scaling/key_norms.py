"""Scalings that divide by a statistic of the norms of the visible keys.

All of them leave the logits unchanged when every key is multiplied by the same positive number, and all carry
a gradient into the keys through the statistic. A statistic of zero gives the factor 0.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad

from ..core.statistics import Statistics, counts_of, reciprocal, reciprocal_root
from ..core.visibility import Visibility
from .base import Scales, Scaling, dense_norms, mode


def _at_least_one(n: Tensor) -> Tensor:
    return n.clamp(min=1)


_VARIANT = "variant of `key_norm_sum`"


@mode(
    "key_norm_sum",
    "1/sum ‖k‖",
    source="Bernhard 2023, arXiv:2311.09406",
    advice="the paper's; pushes attention to uniform as n grows: use a `gain`",
)
class KeyNormSum(Scaling):
    """factor = 1 / sum ||k||, over the visible keys.

    |logit| <= ||q|| / n for keys of equal norm: as n grows the row attends uniformly, and the gradient of q
    and k fades like 1 / n. A learned gain, or `KeyNormMean`, prevents that.

    Source: Bernhard 2023, "Alternatives to the scaled dot product for attention in the Transformer neural
    network architecture", arXiv:2311.09406; `total_length_rescale` of
    https://github.com/James-Bernhard/attnsims.
    """

    def scales(self, q: Tensor, k: Tensor, visibility: Visibility, statistics: Statistics) -> Scales:
        return Scales(1.0, query=reciprocal(statistics.norm_sum))

    def multiplier(self, q: Tensor, k: Tensor, visible: Tensor) -> Tensor:
        return reciprocal(_visible_norms(k, visible).sum(-1, keepdim=True))


@mode(
    "key_norm_mean",
    "1/mean ‖k‖",
    source=_VARIANT,
    advice="about 1/sqrt(D) for unit-variance keys, whatever their size: the one to replace `sqrt_dim` by",
)
class KeyNormMean(Scaling):
    """factor = 1 / mean ||k||, over the visible keys: about 1 / sqrt(D) for components of unit variance.

    It is n times the factor of `KeyNormSum` (Bernhard 2023, arXiv:2311.09406).
    """

    def scales(self, q: Tensor, k: Tensor, visibility: Visibility, statistics: Statistics) -> Scales:
        return Scales(1.0, query=reciprocal(statistics.norm_sum / counts_of(visibility, _at_least_one)))

    def multiplier(self, q: Tensor, k: Tensor, visible: Tensor) -> Tensor:
        n = visible.sum(-1, keepdim=True)
        return reciprocal(_visible_norms(k, visible).sum(-1, keepdim=True) / torch.where(n > 0, n, 1))


@mode("key_norm_rms", "1/sqrt(mean ‖k‖²)", source=_VARIANT, advice="likewise, smoother")
class KeyNormRms(Scaling):
    """factor = 1 / sqrt(mean ||k||^2), over the visible keys."""

    def scales(self, q: Tensor, k: Tensor, visibility: Visibility, statistics: Statistics) -> Scales:
        mean_square = statistics.norm_square_sum / counts_of(visibility, _at_least_one)
        return Scales(1.0, query=reciprocal_root(mean_square))

    def multiplier(self, q: Tensor, k: Tensor, visible: Tensor) -> Tensor:
        n = visible.sum(-1, keepdim=True)
        norm = _visible_norms(k, visible).norm(dim=-1, keepdim=True)
        return reciprocal(norm / torch.where(n > 0, n, 1).double().sqrt())


@mode(
    "key_norm_max",
    "1/max ‖k‖",
    source=_VARIANT,
    advice="likewise; the gradient through the norm reaches the key of the largest norm only",
)
class KeyNormMax(Scaling):
    """factor = 1 / max ||k||, over the visible keys; the lowest of equal keys takes the gradient."""

    def scales(self, q: Tensor, k: Tensor, visibility: Visibility, statistics: Statistics) -> Scales:
        return Scales(1.0, query=reciprocal(statistics.norm_max))

    def multiplier(self, q: Tensor, k: Tensor, visible: Tensor) -> Tensor:
        # One more key, of norm 0, so that a maximum over no keys exists.
        candidates = pad(_visible_norms(k, visible), (0, 1))
        first = candidates.argmax(-1, keepdim=True)
        return reciprocal(candidates.gather(-1, first))


@mode("key_norm_l2", "1/sqrt(sum ‖k‖²)", source=_VARIANT, advice="between mean and sum")
class KeyNormL2(Scaling):
    """factor = 1 / sqrt(sum ||k||^2), over the visible keys: the Frobenius norm of those keys."""

    def scales(self, q: Tensor, k: Tensor, visibility: Visibility, statistics: Statistics) -> Scales:
        return Scales(1.0, query=reciprocal_root(statistics.norm_square_sum))

    def multiplier(self, q: Tensor, k: Tensor, visible: Tensor) -> Tensor:
        return reciprocal(_visible_norms(k, visible).norm(dim=-1, keepdim=True))


def _visible_norms(k: Tensor, visible: Tensor) -> Tensor:
    """||k[j]|| where row i attends to key j, else 0: fp64 [B, Hq, Sq, Sk]."""
    return torch.where(visible, dense_norms(k, visible.any(-2))[..., None, :], 0)
