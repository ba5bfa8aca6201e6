"""A test of the claim that dividing by the sum of the keys' norms helps where their number or norms vary.

Scalings differ by constant factors that any model learns away (in W_q, or as a gain). So a mode is given one gain for
a whole batch, the best one, and judged by how far one temperature serves all rows of the batch. A row's reach is

    reach = ||dp / d(q . k)||_F / the largest that it could be at any gain

of `RowStatistics.gradient_norm`: 1 where most of a gradient passes at the row's temperature, near 0 where its softmax
is one-hot or uniform. Without the gain it judges the mode as published.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from ...analysis.row_statistics import RowStatistics
from ...scaling import SCALINGS
from .distributions import of_equal_norm, of_log_normal_norm
from .measures import softmax_measures, statistics_of

KEYS = 256  # geometric mean of n
_DIM, _ROWS = 64, 4
# Standard deviations of a row's logits, 2^-6 to 2^12, at which its gradient is measured, and gains to try. A gradient
# passes up to very large ones where the two largest logits are almost equal.
_STEP = 0.25
_SPREADS = torch.arange(-6, 12 + _STEP, _STEP, dtype=torch.float64)
_GAINS = torch.arange(-24, 24 + _STEP, _STEP, dtype=torch.float64)


@dataclass(frozen=True)
class Condition:
    """The variation in a batch of the number and the norms of the keys.

    fold    the largest n over the smallest
    norms   vary "between" sequences or "within" each
    """

    name: str
    fold: int = 1
    norms: str | None = None


CONDITIONS = (
    Condition("homogeneous"),
    Condition("counts vary 2-fold", fold=2),
    Condition("counts vary 256-fold", fold=256),
    Condition("norms vary between sequences", norms="between"),
    Condition("norms vary within a sequence", norms="within"),
    Condition("counts and norms vary", fold=256, norms="between"),
)


@dataclass(frozen=True)
class Reach:
    """The reach of one mode under one condition.

    as_published   mean reach of the rows without a gain
    near_one_hot, near_uniform   shares of the rows, likewise
    gain           the one gain of the batch with the largest mean reach
    tuned          mean reach with it
    lowest         reach with it that a tenth of the rows fall short of
    unevenness     standard deviation over the rows of ln(standard deviation of a row's logits): 0 where one gain suits
                   all rows alike; no gain changes it
    """

    as_published: float
    near_one_hot: float
    near_uniform: float
    gain: float
    tuned: float
    lowest: float
    unevenness: float


@dataclass(frozen=True)
class Batch:
    """Random operands: q [sets, 1, rows, D], k [sets, 1, Sk, D], fp64, and key_lengths [sets]."""

    q: Tensor
    k: Tensor
    key_lengths: Tensor

    @classmethod
    def of(cls, condition: Condition, sets: int, seed: int, device: torch.device) -> Batch:
        """Draw a batch: n around 256, even in its logarithm; norms sqrt(D), or that times exp of a normal number."""
        random = torch.Generator().manual_seed(seed)
        q = torch.randn(sets, 1, _ROWS, _DIM, generator=random, dtype=torch.float64)
        exponent = torch.rand(sets, generator=random, dtype=torch.float64) - 0.5
        counts = (KEYS * condition.fold**exponent).round().long()
        k = torch.randn(sets, 1, int(counts.max()), _DIM, generator=random, dtype=torch.float64)
        k = of_log_normal_norm(k, random) if condition.norms == "within" else of_equal_norm(k)
        if condition.norms == "between":
            k = k * torch.randn(sets, 1, 1, 1, generator=random, dtype=torch.float64).exp()
        return cls(*(x.to(device) for x in (q, k, counts)))

    def statistics(self, mode: str, gain: Tensor | None = None) -> RowStatistics:
        return statistics_of(self.q, self.k, mode, key_lengths=self.key_lengths, gain=gain)


class Curves:
    """The reach of every row of a batch by the standard deviation of its logits.

    Modes that multiply rows by a factor give a row the same probabilities wherever they give its logits the same
    deviation; a mode with factors of keys has other curves.
    """

    def __init__(self, batch: Batch, mode: str) -> None:
        spread = batch.statistics(mode).logit_std
        gradients = [batch.statistics(mode, 2**wanted / spread).gradient_norm.flatten() for wanted in _SPREADS]
        norms = torch.stack(gradients, dim=-1)  # [rows, spreads]
        self._reach = norms / norms.amax(-1, keepdim=True)

    def at(self, spread: Tensor) -> Tensor:
        """Interpolate the reach of every row where its logits have the deviations spread [rows]."""
        first, last = float(_SPREADS[0]), float(_SPREADS[-1])
        position = ((spread.log2() - first) / _STEP).clamp(0, (last - first) / _STEP)
        low = position.floor().clamp(max=self._reach.shape[1] - 2).long()[:, None]
        part = position[:, None] - low
        reach = self._reach.gather(1, low) * (1 - part) + self._reach.gather(1, low + 1) * part
        # Below the first deviation p is uniform, and the gradient falls as the factor does.
        return reach.squeeze(1) * (spread / 2**first).clamp(max=1)


def reaches_of(batch: Batch, modes: Iterable[str]) -> dict[str, Reach]:
    """Judge modes on a batch: those that multiply rows by a factor share their curves."""
    named = {mode: mode if SCALINGS[mode].about.has_key_factor else "none" for mode in modes}
    curves = {name: Curves(batch, name) for name in set(named.values())}
    return {mode: reach_of(batch, mode, curves[name]) for mode, name in named.items()}


def reach_of(batch: Batch, mode: str, curves: Curves) -> Reach:
    """Judge a mode on a batch by its curves."""
    rows = batch.statistics(mode)
    spread = rows.logit_std.flatten()
    means = torch.stack([curves.at(spread * 2**gain).mean() for gain in _GAINS])
    best = 2 ** float(_GAINS[int(means.argmax())])
    tuned = curves.at(spread * best)
    shares = softmax_measures(rows)
    return Reach(
        as_published=float(curves.at(spread).mean()),
        near_one_hot=shares["near_one_hot"],
        near_uniform=shares["near_uniform"],
        gain=best,
        tuned=float(tuned.mean()),
        lowest=float(tuned.quantile(0.1)),
        unevenness=float(spread.log().std(correction=0)),
    )
