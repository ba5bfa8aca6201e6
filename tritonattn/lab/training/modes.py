"""The scalings of train-compare's --modes."""

from __future__ import annotations

import math
from collections.abc import Callable

from torch import nn

from ...core.errors import CommandError
from ...nn import LEARNED, LearnedLogPower, PerHead, QueryAdaptiveSSMax, SSMax
from ...scaling import SCALINGS, LogKeyCount, LogPower, QwenLogn, Scaling

GAIN = "+gain"
_LEARNED = (*LEARNED, QueryAdaptiveSSMax.name)
MODES = (
    "sqrt_dim",
    "key_norm_mean",
    "key_norm_sum+gain",
    "key_count",
    "key_count+gain",
    "log_key_count",
    "ssmax",
    "learned_cosine",
    "power_law",
)


def build(name: str, heads: int, head_dim: int, keys: int) -> str | Scaling:
    """Make a scaling for one attention layer.

    name   one of `SCALINGS` or `LEARNED`, or a mode with a learned gain a head, "key_count+gain"
    keys   the most keys that a row of the layer attends to in training

    Modes with a base (log_key_count, qwen_logn, ssmax, ...) get `keys` for it: a row of that many keys starts as
    sqrt_dim's. A gain starts where a mode that divides by n or by its root does the same, and where one that divides by
    a sum of norms divides by their mean; for other modes at 1.
    """
    check_mode(name)
    if name.endswith(GAIN):
        scaling = PerHead(_mode(name.removesuffix(GAIN), keys), heads=heads)
        nn.init.constant_(scaling.theta, math.log(_gain(name.removesuffix(GAIN), head_dim, keys)))
        return scaling
    learned: dict[str, Callable[[], Scaling]] = {
        "ssmax": lambda: SSMax(heads, base=keys),
        "learned_log_power": lambda: LearnedLogPower(heads, base=keys),
        QueryAdaptiveSSMax.name: lambda: QueryAdaptiveSSMax(heads, head_dim),
    }
    if name in learned:
        return learned[name]()
    return LEARNED[name](heads=heads) if name in LEARNED else _mode(name, keys)


def check_mode(name: str) -> None:
    """Raise CommandError for a name that `build` does not know."""
    plain = name.removesuffix(GAIN)
    if plain not in SCALINGS and (name.endswith(GAIN) or name not in _LEARNED):
        raise CommandError(
            f"--modes: expected names out of {', '.join(SCALINGS)}, one of these with {GAIN}, or {', '.join(_LEARNED)}"
            f", got {name!r}"
        )


def _mode(name: str, keys: int) -> str | Scaling:
    based: dict[str, Callable[[int], Scaling]] = {
        "log_key_count": LogKeyCount,
        "log_power": lambda base: LogPower(base=base),
        "qwen_logn": QwenLogn,
    }
    return based[name](keys) if name in based else name


def _gain(name: str, head_dim: int, keys: int) -> float:
    return {
        "key_count": keys / math.sqrt(head_dim),
        "sqrt_key_count": math.sqrt(keys / head_dim),
        "key_norm_sum": keys,
        "key_norm_l2": math.sqrt(keys),
    }.get(name, 1.0)
