"""Means over seeds with their confidence intervals."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean, stdev


@dataclass(frozen=True)
class Interval:
    """mean +- half: a confidence interval of the mean of normally distributed values.

        half = t * s / sqrt(n)

    t is the quantile of Student's t with n - 1 degrees of freedom, s the sample's standard deviation; half is infinite
    for a single value.
    """

    mean: float
    half: float

    @classmethod
    def of(cls, values: Sequence[float], confidence: float = 0.95) -> Interval:
        """Compute the interval of at least one value."""
        from scipy import stats  # not among the packages of the demo, which trains too

        n, mean = len(values), fmean(values)
        if n == 1:
            return cls(mean, math.inf)
        return cls(mean, float(stats.t.ppf((1 + confidence) / 2, n - 1)) * stdev(values) / math.sqrt(n))

    @property
    def excludes_zero(self) -> bool:
        return abs(self.mean) > self.half

    def text(self, digits: int = 3, sign: str = "") -> str:
        half = "?" if math.isinf(self.half) else f"{self.half:.{digits}f}"
        return f"{self.mean:{sign}.{digits}f} ± {half}"
