"""Scalings that learn how the factor grows with ln(n): the power per head, and a weight that the query gives."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from ..calls.checks import check_count, check_dtype
from ..core.hints import hinted
from ..core.invariance import halving_sum
from ..core.invariance import power as power_of
from ..core.statistics import Statistics, counts_of
from ..core.torch_distributed import local
from ..core.visibility import Visibility
from ..scaling import Scales
from ..scaling.base import NO_BASE, check_positive, warn_without_base
from .learned import Learned, starts_at_sqrt_dim


@hinted
class LearnedLogPower(Learned):
    """factor = (ln(n) / ln(base))^p_h / sqrt(D), n = the number of visible keys, p learned for every head.

    A lone key has factor 0, or 1 / sqrt(D) where p is exactly 0. Without sinks this is harmless: its probability is 1
    at any logit.

    Args:
        heads: Hq.
        power: Where every head's p starts; exactly the mode `LogPower(power, base)`.
        base: The n at which the factor is that of sqrt_dim, whatever p is; without one e, with a warning.
        mode: None starts at power; "sqrt_dim" starts exactly at that mode, p = 0, for a model that was trained with it.
        device, dtype: The device and dtype of p [heads].

    Source: the power depends on the gaps between a row's largest logits, 1/2, 1 and 2 being its cases:
    arXiv:2605.12697; "Critical attention scaling in long-context transformers", arXiv:2510.05554.

    Raises:
        TypeError, ValueError: An invalid number of heads, mode or dtype; a power that is not finite and above 0; a base
            that is not finite and above 1.

    >>> import torch, tritonattn
    >>> scaling = tritonattn.nn.LearnedLogPower(heads=4, base=512)
    >>> q, k, v = torch.randn(3, 1, 4, 16, 8)
    >>> tritonattn.attention(q, k, v, scaling=scaling, causal=True).sum().backward()
    >>> scaling.p.grad.shape
    torch.Size([4])
    """

    name = "learned_log_power"
    reads_keys = False
    trained_length = "base"
    p: nn.Parameter
    power, mode = 0.5, None  # of a pickle that has none

    def __init__(
        self,
        heads: int,
        power: float = 0.5,
        base: float = NO_BASE,
        *,
        mode: str | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(heads)
        check_positive("power", power)
        check_positive("base", base, above=1.0)
        if (is_sqrt_dim := starts_at_sqrt_dim(mode)) and power != 0.5:
            raise ValueError(f"power: expected none with mode='sqrt_dim', which starts at p = 0, got {power}")
        self.power, self.base, self.mode = power, base, mode
        if not is_sqrt_dim:
            warn_without_base(self.name, base)
        self._learn(device, dtype, p=0.0 if is_sqrt_dim else power)

    def extra_repr(self) -> str:
        start = f"power={self.power:g}" if self.mode is None else f"mode={self.mode!r}"
        return f"heads={self.heads}, {start}, base={self.base:g}"

    def scales(self, q: Tensor, k: Tensor, visibility: Visibility, statistics: Statistics) -> Scales:
        factor = _power_of_log(counts_of(visibility), self.per_head(self.p, q), self.base)  # [B, Hq, Sq]
        return Scales(q.shape[-1] ** -0.5, query=factor)

    def multiplier(self, q: Tensor, k: Tensor, visible: Tensor) -> Tensor:
        p = self.per_head(self.p, q)[..., None]  # [Hq, 1, 1]
        n = visible.sum(-1, keepdim=True).double()
        exponent = p * (torch.where(n > 1, n, 2).log2() / math.log2(self.base)).log()
        return torch.where(n > 1, exponent.exp(), (p == 0).double()) / math.sqrt(k.shape[-1])


@hinted
class QueryAdaptiveSSMax(Learned):
    """factor = (delta_h + softplus(w_h . q[i]) * ln(n)^gamma_h) / sqrt(D): every query says how much ln(n) counts.

    The gradient reaches q through its product with w too. A lone key has ln(n)^gamma = 0, or 1 where gamma is exactly
    0.

    Args:
        heads: Hq.
        head_dim: D, the head dim of q.
        mode: Where every head starts, w being 0. None is delta = gamma = 1: all queries alike, 1 + ln(2) ln(n).
            "sqrt_dim" is that mode, for a model that was trained with it: gamma = 0 and delta = 1 - ln(2), since
            softplus(0) = ln(2). So w, delta and gamma all have gradients from the start; the sum is 1 to the
            rounding of delta.
        device, dtype: The device and dtype of w [heads, D] and of delta and gamma [heads].

    Source: Vasylenko et al. 2025, "Long-context generalization with sparse attention", arXiv:2506.16640, where the
    factor stands before alpha-entmax (ASEntmax); here it stands before the softmax.

    Raises:
        TypeError, ValueError: Invalid sizes, mode or dtype; in a call, a q of another head dim.

    >>> import torch, tritonattn
    >>> q, k, v = torch.randn(3, 1, 4, 16, 8)
    >>> scaling = tritonattn.nn.QueryAdaptiveSSMax(heads=4, head_dim=8)
    >>> tritonattn.attention(q, k, v, scaling=scaling, causal=True).sum().backward()
    >>> scaling.w.grad.shape
    torch.Size([4, 8])
    """

    name = "query_adaptive_ssmax"
    reads_keys = False
    delta: nn.Parameter
    gamma: nn.Parameter
    mode = None  # of a pickle that has none

    def __init__(
        self,
        heads: int,
        head_dim: int,
        *,
        mode: str | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(heads)
        check_count("head_dim", head_dim, 1)
        check_dtype(dtype)
        self.head_dim, self.mode = head_dim, mode
        self.w = nn.Parameter(torch.empty(heads, head_dim, device=device, dtype=dtype))
        delta, gamma = (1 - math.log(2), 0.0) if starts_at_sqrt_dim(mode) else (1.0, 1.0)
        self._learn(device, dtype, w=0.0, delta=delta, gamma=gamma)

    def extra_repr(self) -> str:
        start = "" if self.mode is None else f", mode={self.mode!r}"
        return f"heads={self.heads}, head_dim={self.head_dim}{start}"

    def scales(self, q: Tensor, k: Tensor, visibility: Visibility, statistics: Statistics) -> Scales:
        delta, gamma = self.per_head(self.delta, q), self.per_head(self.gamma, q)  # [Hq, 1]
        if not visibility.every_row_attends:
            q = torch.where(visibility.attending_rows()[..., None], q, 0)  # NaN in a row without keys would reach w
        logarithm = _power_of_log(counts_of(visibility), gamma, math.e)
        self._check_head_dim(q)
        if visibility.invariant:
            product = halving_sum(q.double() * local(self.w).double()[:, None])[..., 0]
            positive = torch.where(product > 0, product, 0)  # softplus rounds as `power` says of pow
            weight = positive + (product - 2 * positive).exp().log1p()  # unlike -|x|, with its slope at 0
        else:
            weight = nn.functional.softplus((q.double() @ local(self.w).double()[..., None])[..., 0])  # [B, Hq, Sq]
        return Scales(q.shape[-1] ** -0.5, query=delta + weight * logarithm)

    def multiplier(self, q: Tensor, k: Tensor, visible: Tensor) -> Tensor:
        delta, gamma = (self.per_head(x, q)[..., None] for x in (self.delta, self.gamma))  # [Hq, 1, 1]
        n = visible.sum(-1, keepdim=True).double()
        logarithm = torch.where(n > 1, torch.where(n > 1, n, 2).log().pow(gamma), (gamma == 0).double())
        self._check_head_dim(q)
        weight = (1 + (q.double() * local(self.w).double()[:, None]).sum(-1, keepdim=True).exp()).log()
        return (delta + weight * logarithm) / math.sqrt(k.shape[-1])

    def _check_head_dim(self, q: Tensor) -> None:
        if q.shape[-1] != self.head_dim:
            raise ValueError(
                f"scaling: expected q of {type(self).__name__}'s head dim {self.head_dim}, got {q.shape[-1]}"
            )


def _power_of_log(n: Tensor, power: Tensor, base: float) -> Tensor:
    """(ln(n) / ln(base))^power in fp64, 0^power where n is at most 1: there the slope of a power would be NaN."""
    logarithm = n.clamp(min=2).double().log() / math.log(base)
    return torch.where(n > 1, power_of(logarithm, power), (power == 0).double())
