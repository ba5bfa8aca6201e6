"""Thresholds of a Monitor, and the alarms of layers beyond them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ..core.hints import hinted

LOSS = "loss"


@hinted
@dataclass(frozen=True)
class Thresholds:
    """Limits beyond which a layer raises an alarm; None is no limit.

    max_logit      the largest logit of any head and row: QK-clip's tau (Kimi K2, arXiv:2507.20534, uses 100)
    near_one_hot   share of rows with one key above 0.95, mean over the heads; their softmax passes no gradient
    near_uniform   share of rows with entropy / ln n above 0.98, mean over the heads; they average their values
    warmup         steps at the start of training in which near_uniform raises no alarm, since a fresh model is uniform;
                   0 for a pretrained model. All other alarms begin at step 0

    >>> from tritonattn.analysis import Thresholds
    >>> Thresholds(max_logit=50.0, near_uniform=None)
    Thresholds(max_logit=50.0, near_one_hot=0.9, near_uniform=None, warmup=100)
    """

    max_logit: float | None = 100.0
    near_one_hot: float | None = 0.9
    near_uniform: float | None = 0.9
    warmup: int = 100

    def __post_init__(self) -> None:
        for name, value in self.limits().items():
            if isinstance(value, bool) or not isinstance(value, (int, float)) or value != value:
                raise ValueError(f"thresholds.{name}: expected a number or None, got {value!r}")
            if name == "max_logit" and value <= 0:
                raise ValueError(f"thresholds.max_logit: expected a number above 0, or None, got {value!r}")
            if name != "max_logit" and not 0 <= value <= 1:
                raise ValueError(f"thresholds.{name}: expected a share of rows, from 0 to 1, got {value!r}")
        if isinstance(self.warmup, bool) or not isinstance(self.warmup, int) or self.warmup < 0:
            raise ValueError(f"thresholds.warmup: expected a number of steps, at least 0, got {self.warmup!r}")

    def limits(self, step: int | None = None) -> dict[str, float]:
        """The limits by their measures: all, or those that raise alarms in a step."""
        limits = {name: getattr(self, name) for name in ("max_logit", "near_one_hot", "near_uniform")}
        if step is not None and step < self.warmup:
            del limits["near_uniform"]
        return {name: limit for name, limit in limits.items() if limit is not None}


@dataclass(frozen=True)
class Alarm:
    """A measure of a layer beyond its threshold, or a loss that is not finite.

    step      of the record
    layer     the module's name; "" for the loss
    measure   a limit of `Thresholds`, or "loss"
    value     the measure: the largest head's logit, else the heads' mean
    limit     the threshold; NaN for the loss
    heads     the measure by head, None for one without rows; () for the loss
    new       True where the layer was within the threshold in the last watched step

    >>> from tritonattn.analysis import Alarm
    >>> print(Alarm(200, "layers.0", "max_logit", value=120.0, limit=100.0, heads=(120.0, 8.0)))
    layers.0: max_logit 120, threshold 100
    """

    step: int
    layer: str
    measure: str
    value: float
    limit: float
    heads: tuple[float | None, ...] = ()
    new: bool = True

    def __str__(self) -> str:
        if self.measure == LOSS:
            return f"loss: {self.value}"
        return f"{self.layer}: {self.measure} {self.value:.4g}, threshold {self.limit:g}"


class Alarms:
    """The alarms of a run, which stand until their measure is back within its threshold."""

    def __init__(self, thresholds: Thresholds) -> None:
        self._thresholds = thresholds
        self._standing: set[tuple[str, str]] = set()

    def of(self, step: int, layers: dict[str, dict[str, Any]]) -> list[Alarm]:
        """The standing alarms of the layers that were watched in this step."""
        found = []
        for layer, measures in layers.items():
            for measure, limit in self._thresholds.limits(step).items():
                value = layer_value(measure, measures[measure])
                if value is None or value <= limit:
                    self._standing.discard((layer, measure))
                    continue
                new = (layer, measure) not in self._standing
                self._standing.add((layer, measure))
                found.append(Alarm(step, layer, measure, value, limit, tuple(measures[measure]), new))
        return found

    def of_loss(self, step: int, loss: float) -> list[Alarm]:
        """The alarm of a loss, if it is not finite."""
        if math.isfinite(loss):
            self._standing.discard(("", LOSS))
            return []
        new = ("", LOSS) not in self._standing
        self._standing.add(("", LOSS))
        return [Alarm(step, "", LOSS, loss, math.nan, (), new)]


def layer_value(measure: str, heads: Sequence[float | None]) -> float | None:
    """The number that a threshold limits: over heads, the maximum of the largest logit, the mean of other measures.

    Heads without rows, None, do not count. None if no head is left, NaN if one of them is NaN.
    """
    counted = [value for value in heads if value is not None]
    if not counted:
        return None
    total = sum(counted)
    if math.isnan(total) and any(map(math.isnan, counted)):
        return math.nan
    return max(counted) if measure == "max_logit" else total / len(counted)
