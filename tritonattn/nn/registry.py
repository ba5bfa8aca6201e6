"""The learned scalings by name."""

from __future__ import annotations

from typing import Any

from ..scaling import Scaling
from ..scaling.names import named_scaling
from .learned import LearnedCosine, PerHead, SSMax
from .log_power import LearnedLogPower
from .power_law import PowerLaw

# Each is made with heads=Hq, and otherwise its defaults.
LEARNED: dict[str, type[PerHead | SSMax | PowerLaw | LearnedLogPower]] = {
    "per_head": PerHead,
    "ssmax": SSMax,
    "learned_cosine": LearnedCosine,
    "power_law": PowerLaw,
    "learned_log_power": LearnedLogPower,
}


def named(name: str, heads: int, **options: Any) -> Scaling:
    """The mode of a name in SCALINGS, or a new module of a name in LEARNED, made with the options."""
    return LEARNED[name](heads=heads, **options) if name in LEARNED else named_scaling(name, LEARNED)


def named_at_sqrt_dim(name: str, heads: int) -> Scaling:
    """As `named`, for a layer that was trained with sqrt_dim: a learned module starts there, but for a cosine."""
    return named(name, heads) if name == LearnedCosine.name else named(name, heads, mode="sqrt_dim")
