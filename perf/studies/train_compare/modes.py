"""The modes of a study, also with a gain, and two of them, as "sqrt_dim:log_key_count"."""

from __future__ import annotations

import math
import re

from torch import nn

from tritonattn.lab import modes
from tritonattn.nn import PerHead
from tritonattn.scaling import SCALINGS, Scaling

SWAP = ":"
GAIN = "+gain"
_GAINED = re.compile(r"(?P<mode>\w+)(?P<gain>\+gain|\*(\d*[1-9]\d*(\.\d+)?|0\.\d*[1-9]\d*))")
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


def check_mode(name: str) -> None:
    """Raise CommandError for a name that `build` does not know."""
    found = _GAINED.fullmatch(name)
    if found is None or found["mode"] not in SCALINGS:
        modes.check_mode(name, f", also with {GAIN} or *4 behind it")


def build(name: str, heads: int, head_dim: int, keys: int) -> str | Scaling:
    """Make a scaling for one attention layer, as `lab.modes.build`.

    name   also one of `SCALINGS` with a learned gain per head, "key_count+gain", or with a constant one, "sqrt_dim*4"

    A learned gain starts where a mode that divides by n or by its root does the same as sqrt_dim, and where one that
    divides by a sum of norms divides by their mean; for other modes at 1.
    """
    found = _GAINED.fullmatch(name)
    if found is None:
        return modes.build(name, heads, head_dim, keys)
    mode, gain = found.group("mode", "gain")
    starts = {
        "key_count": keys / math.sqrt(head_dim),
        "sqrt_key_count": math.sqrt(keys / head_dim),
        "key_norm_sum": keys,
        "key_norm_l2": math.sqrt(keys),
    }
    is_learned = gain == GAIN
    scaling = PerHead(modes.build(mode, heads, head_dim, keys), heads=heads)
    nn.init.constant_(scaling.theta, math.log(starts.get(mode, 1.0) if is_learned else float(gain[1:])))
    return scaling.requires_grad_(is_learned)
