"""The scalings of train-compare's --modes."""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Callable

from torch import nn

from ...core.errors import CommandError
from ...nn import LEARNED, LearnedLogPower, PerHead, QueryAdaptiveSSMax, SSMax
from ...scaling import SCALINGS, LogKeyCount, LogPower, QwenLogn, Scaling

SWAP = ":"
GAIN = "+gain"
_WRITTEN = re.compile(r"(?P<mode>\w+)(?P<gain>\+gain|\*(\d*[1-9]\d*(\.\d+)?|0\.\d*[1-9]\d*))?")
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


def trained_and_tested(mode: str) -> tuple[str, str]:
    """Split "sqrt_dim:log_key_count", trained with the first and tested with the second; one name is both."""
    trained, _, tested = mode.partition(SWAP)
    return trained, tested or trained


def build(name: str, heads: int, head_dim: int, keys: int) -> str | Scaling:
    """Make a scaling for one attention layer.

    name   one of `SCALINGS` or `LEARNED`; or one of `SCALINGS` with a learned gain a head, "key_count+gain", or with
           a constant one, "sqrt_dim*4"
    keys   the most keys that a row of the layer attends to in training

    Modes with a base (log_key_count, qwen_logn, ssmax, ...) get `keys` for it: a row of that many keys starts as
    sqrt_dim's. A gain starts where a mode that divides by n or by its root does the same, and where one that divides by
    a sum of norms divides by their mean; for other modes at 1.
    """
    check_mode(name)
    plain, gain = _parts(name)
    if gain is not None:
        constant = gain.startswith("*")
        scaling = PerHead(_mode(plain, keys), heads=heads)
        start = float(gain[1:]) if constant else _gain(plain, head_dim, keys)
        nn.init.constant_(scaling.theta, math.log(start))
        return scaling.requires_grad_(not constant)
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
    plain, gain = _parts(name)
    if plain not in SCALINGS and (gain is not None or name not in _LEARNED):
        close = difflib.get_close_matches(name, [*SCALINGS, *_LEARNED], n=1)
        hint = f" (did you mean {close[0]!r}?)" if close else ""
        raise CommandError(
            f"--modes: expected one of {', '.join(SCALINGS)}, also with {GAIN} or *4 behind it, or one of"
            f" {', '.join(_LEARNED)}; in train-compare also two as TRAINED{SWAP}TESTED; got {name!r}{hint}"
        )


def _parts(name: str) -> tuple[str, str | None]:
    """Split off "+gain", or "*4" for a constant one."""
    found = _WRITTEN.fullmatch(name)
    return (found["mode"], found["gain"]) if found else (name, None)


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
