"""Scalings that depend on n, the number of keys visible to the row."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ..core.autograd import values_are_read
from ..core.hints import hinted
from ..core.invariance import power
from ..core.statistics import Statistics, counts_of, reciprocal, reciprocal_root
from ..core.visibility import Visibility
from .base import NO_BASE, Scales, Scaling, check_positive, mode, warn_without_base


def scales_of_count(visibility: Visibility, constant: float, factor: Callable[[Tensor], Tensor]) -> Scales:
    """constant * factor(n), of fp64 counts n of any shape; one number where all rows are known to attend to all keys.

    factor(0) is finite, and the same for the same counts.

    Where `visibility.invariant`, always a vector: one number would be rounded elsewhere.
    """
    is_number = visibility.is_full and isinstance(visibility.k_len, int) and values_are_read()
    if is_number and not visibility.invariant:
        n = torch.tensor(visibility.k_len, dtype=torch.float64, device="cpu")
        return Scales(constant * factor(n).item())
    return Scales(constant, query=counts_of(visibility, factor), is_finite=True)


class OfCount(Scaling):
    """A mode of parameters whose factor is a constant times a function of n, the keys that a row attends to.

    Raises ValueError unless each parameter is finite and above 0, and a trained length above 1.
    """

    def __post_init__(self) -> None:
        for name in type(self).__match_args__:  # pyright: ignore[reportAttributeAccessIssue]  of a dataclass, fields by position
            value = getattr(self, name)
            check_positive(name, value, above=float(name == self.trained_length))
            warn_without_base(self.name, value)

    def _constant(self, head_dim: int) -> float:
        return head_dim**-0.5

    def _of_count(self, n: Tensor) -> Tensor:
        """The factor for fp64 counts n, of any shape; finite at 0."""
        raise NotImplementedError

    def scales(self, q: Tensor, k: Tensor, visibility: Visibility, statistics: Statistics) -> Scales:
        return scales_of_count(visibility, self._constant(q.shape[-1]), self._of_count)


@mode("key_count", "1/n", advice="pushes attention to uniform as n grows: use a `gain`")
class KeyCount(Scaling):
    """factor = 1 / n.

    The logits shrink as n grows, so that long rows attend almost uniformly, as with `KeyNormSum`.
    """

    def scales(self, q: Tensor, k: Tensor, visibility: Visibility, statistics: Statistics) -> Scales:
        return scales_of_count(visibility, 1.0, torch.reciprocal if visibility.every_row_attends else reciprocal)

    def multiplier(self, q: Tensor, k: Tensor, visible: Tensor) -> Tensor:
        return reciprocal(visible.sum(-1, keepdim=True))


@mode("sqrt_key_count", "1/sqrt(n)", advice="likewise, more slowly")
class SqrtKeyCount(Scaling):
    """factor = 1 / sqrt(n)."""

    def scales(self, q: Tensor, k: Tensor, visibility: Visibility, statistics: Statistics) -> Scales:
        return scales_of_count(visibility, 1.0, reciprocal_root)

    def multiplier(self, q: Tensor, k: Tensor, visible: Tensor) -> Tensor:
        return reciprocal(visible.sum(-1, keepdim=True)).sqrt()


@mode(
    "log_key_count",
    "ln(n)/ln(base)/sqrt(D)",
    source="Chiang & Cholak 2022, arXiv:2202.12172",
    advice="keeps attention sharp as n grows; with base = training length it is `sqrt_dim` at that length; Su uses 512;"
    " without a base it is e, and warns",
)
@hinted
@dataclass(frozen=True)
class LogKeyCount(OfCount):
    """factor = ln(n) / ln(base) / sqrt(D): keeps attention from spreading out as n grows.

    A lone key has logit 0, which is harmless: its probability is 1 at any logit.

    base   the n at which the factor is that of `SqrtDim`, such as the trained length; e, with a warning, by default

    Source: Chiang & Cholak 2022, "Overcoming a theoretical limitation of self-attention", ACL 2022, long.527
    (base e); Su 2021, https://kexue.fm/archives/8823 (base 512, the training length).
    Raises ValueError unless base is finite and above 1.
    """

    base: float = NO_BASE

    trained_length = "base"

    def _constant(self, head_dim: int) -> float:
        return head_dim**-0.5 / math.log(self.base)

    def _of_count(self, n: Tensor) -> Tensor:
        return n.clamp(min=1).log()

    def multiplier(self, q: Tensor, k: Tensor, visible: Tensor) -> Tensor:
        n = visible.sum(-1, keepdim=True).double()
        logarithm = torch.where(n > 0, n, 1).log2() / math.log2(self.base)
        return logarithm / math.sqrt(k.shape[-1])


@mode(
    "log_power",
    "(ln(n)/ln(base))^p/sqrt(D)",
    {"p": "1/2"},
    source="arXiv:2510.05554, arXiv:2605.12697",
    advice="p = 1 is `log_key_count`; diffusion models take 1/2 with base = trained tokens (arXiv:2306.08645);"
    " [`diagnose`](monitoring.md#which-power-of-ln-n) measures which p a head asks for (arXiv:2605.12697)",
)
@hinted
@dataclass(frozen=True)
class LogPower(OfCount):
    """factor = (ln(n) / ln(base))^power / sqrt(D).

    Which power keeps the attention of n keys from spreading out or collapsing depends on the gaps between the largest
    logits of a row: 1/2, 1 and 2 are its cases. 1 is `LogKeyCount`.

    power   1/2 by default, the scale of diffusion models sampled at other resolutions, with the trained number of
            tokens as base
    base    the n at which the factor is that of `SqrtDim`, such as the trained length; e, with a warning, by default

    Source: "Critical attention scaling in long-context transformers", arXiv:2510.05554; the powers by gaps:
    arXiv:2605.12697; power 1/2: Jin et al. 2023, arXiv:2306.08645, equation 10.
    Raises ValueError unless power is finite and above 0, base finite and above 1.
    """

    power: float = 0.5
    base: float = NO_BASE

    trained_length = "base"

    def _constant(self, head_dim: int) -> float:
        return head_dim**-0.5 / math.log(self.base) ** self.power

    def _of_count(self, n: Tensor) -> Tensor:
        return power(n.clamp(min=1).log(), self.power)

    def multiplier(self, q: Tensor, k: Tensor, visible: Tensor) -> Tensor:
        n = visible.sum(-1, keepdim=True).double()
        logarithm = torch.where(n > 0, n, 1).log2() / math.log2(self.base)
        return logarithm.pow(self.power) / math.sqrt(k.shape[-1])
