"""The scaling that makes the dot product a cosine."""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import Tensor

from ..core.hints import hinted
from ..core.statistics import Statistics, reciprocal
from ..core.visibility import Visibility
from .base import Scales, Scaling, check_positive, dense_norms, mode


@mode(
    "cosine",
    "sqrt(D)/(‖q‖ ‖k‖)",
    source="Henry 2020, arXiv:2010.04245",
    advice="QK-norm without weights; `Cosine(tau=...)` sets tau",
)
@hinted
@dataclass(frozen=True)
class Cosine(Scaling):
    """factor = tau / (||q|| * ||k||): logit = tau * cos(q, k). A q or k of norm 0 has the factor 0.

    At D = 1 every cosine is 1 or -1: the gradients of q and k are 0 but for rounding. Use D of at least 2.

    tau   None is sqrt(D), what unscaled RMS normalisation of q and k followed by 1 / sqrt(D) gives

    Source: Henry et al. 2020, "Query-key normalization for transformers", arXiv:2010.04245, equation 4; Liu
    et al. 2021, "Swin Transformer V2", arXiv:2111.09883, equation 2 (there tau is learned per head).
    Raises ValueError unless tau is None or finite and above 0.
    """

    tau: float | None = None

    normalises_query = True

    def __post_init__(self) -> None:
        if self.tau is not None:
            check_positive("tau", self.tau)

    def scales(self, q: Tensor, k: Tensor, visibility: Visibility, statistics: Statistics) -> Scales:
        constant = q.shape[-1] ** 0.5 if self.tau is None else self.tau
        return Scales(constant, query=reciprocal(statistics.query_norms(q)), key=reciprocal(statistics.norms))

    def multiplier(self, q: Tensor, k: Tensor, visible: Tensor) -> Tensor:
        tau = math.sqrt(k.shape[-1]) if self.tau is None else self.tau
        norms_of_q = dense_norms(q, visible.any(-1))[..., None]  # [B, Hq, Sq, 1]
        norms_of_k = dense_norms(k, visible.any(-2))[..., None, :]  # [B, Hq, 1, Sk]
        return tau * reciprocal(norms_of_q) * reciprocal(norms_of_k)
