"""The scaling that learns its exponents."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..core.hints import hinted
from ..core.invariance import power
from ..core.statistics import SMALLEST_STATISTIC, Statistics, counts_of
from ..core.visibility import Visibility
from ..scaling import Scales
from ..scaling.base import dense_norms
from .learned import Learned

# a, b, c of the modes that are points of the law.
POINTS = {
    "sqrt_dim": (-0.5, 0.0, 0.0),
    "dim": (-1.0, 0.0, 0.0),
    "none": (0.0, 0.0, 0.0),
    "key_count": (0.0, -1.0, 0.0),
    "sqrt_key_count": (0.0, -0.5, 0.0),
    "key_norm_sum": (0.0, -1.0, -1.0),
    "key_norm_mean": (0.0, 0.0, -1.0),
}

_PARAMETERS = ("theta", "dim_exponent", "count_exponent", "length_exponent")  # the last three are a, b, c
_LARGEST = 1 / SMALLEST_STATISTIC  # as of the modes that divide by a statistic


@hinted
class PowerLaw(Learned):
    """factor = exp(theta_h) * D^a_h * n^b_h * rho^c_h: named modes are points of it, and training moves between them.

    n is the number and rho the mean norm of the keys that the row attends to. The exponents say how a head's logits
    ought to depend on them. A rho of 0 counts as rho^c = 0, without gradient, and as 1 where c is exactly 0. Unless q
    is float64, a factor is 8.5e37 at most, there without gradient.

    Args:
        heads: Hq.
        mode: Where every head starts, exactly: "sqrt_dim", "dim", "none", "key_count", "sqrt_key_count",
            "key_norm_sum" or "key_norm_mean".
        device, dtype: The device and dtype of the parameters, each [heads]: theta, dim_exponent (a), count_exponent
            (b) and length_exponent (c).

    Within one head dim theta and a move the same number, so a is frozen (requires_grad is False) until asked for.

    Raises:
        TypeError: heads that is not an int, or a dtype that is not floating.
        ValueError: A mode that is not a point of the law.

    >>> import torch, tritonattn
    >>> scaling = tritonattn.nn.PowerLaw(heads=4, mode="key_norm_sum")
    >>> q, k, v = torch.randn(3, 1, 4, 16, 8)
    >>> tritonattn.attention(q, k, v, scaling=scaling, causal=True).sum().backward()
    >>> scaling.count_exponent.grad.shape
    torch.Size([4])
    """

    name = "power_law"
    reads_keys = False
    theta: nn.Parameter
    dim_exponent: nn.Parameter
    count_exponent: nn.Parameter
    length_exponent: nn.Parameter
    mode = "sqrt_dim"  # of a pickle that has none

    def __init__(
        self,
        heads: int,
        mode: str = "sqrt_dim",
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(heads)
        if not isinstance(mode, str) or mode not in POINTS:
            raise ValueError(f"mode: expected one of {', '.join(POINTS)}, got {mode!r}")
        self.mode = mode
        self._learn(device, dtype, **dict(zip(_PARAMETERS, (0.0, *POINTS[mode]), strict=True)))
        self.dim_exponent.requires_grad_(False)

    def extra_repr(self) -> str:
        return f"heads={self.heads}, mode={self.mode!r}"

    def scales(self, q: Tensor, k: Tensor, visibility: Visibility, statistics: Statistics) -> Scales:
        theta, a, b, c = (self.per_head(getattr(self, name), q) for name in _PARAMETERS)
        n = counts_of(visibility).clamp(min=1)  # [B or 1, 1 or Hq, Sq]
        rho = statistics.norm_sum / n  # [B, Hkv or Hq, Sq]
        rho = visibility.repeated(rho)
        dim = torch.full((), q.shape[-1], dtype=torch.float64, device=q.device)
        return Scales(1.0, query=_held(theta.exp() * power(dim, a) * power(n, b) * _norm_power(rho, c), q))

    def multiplier(self, q: Tensor, k: Tensor, visible: Tensor) -> Tensor:
        theta, a, b, c = (self.per_head(getattr(self, name), q)[..., None] for name in _PARAMETERS)  # [Hq, 1, 1]
        norms = torch.where(visible, dense_norms(k, visible.any(-2))[..., None, :], 0)  # [B, Hq, Sq, Sk]
        n = visible.sum(-1, keepdim=True).double()
        n = torch.where(n > 0, n, 1)
        rho = norms.sum(-1, keepdim=True) / n
        usable = ~(rho < SMALLEST_STATISTIC)
        logarithm = torch.where(usable, rho, 1).log()
        dim = torch.full((), k.shape[-1], dtype=torch.float64, device=k.device)
        factor = _held(torch.exp(theta + a * dim.log() + b * n.log() + c * logarithm), q)
        return torch.where(usable | (c == 0), factor, 0)


def _held(factor: Tensor, q: Tensor) -> Tensor:
    """A factor in the range of float32, in which it acts: an exponent of -2 makes 1e60 of keys of 1e-30."""
    return factor if q.dtype == torch.float64 else factor.clamp(max=_LARGEST)


def _norm_power(rho: Tensor, c: Tensor) -> Tensor:
    """rho^c; where rho is 0 or below fp32's normal range 0, or 1 where c is 0, without gradient."""
    usable = ~(rho < SMALLEST_STATISTIC)
    return torch.where(usable, power(torch.where(usable, rho, 1), c), (c == 0).double())
