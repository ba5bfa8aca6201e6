"""The learned scalings by name."""

from __future__ import annotations

from typing import Any

from ..scaling import Scaling
from ..scaling.names import named_scaling
from .learned import LearnedCosine, PerHead, SSMax, as_mode
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


def scaling_of_layer(scaling: Any, heads: int, *, trained: bool = False, **options: Any) -> Scaling:
    """The Scaling of a layer: of a name in LEARNED a new module, made with the options; others as `as_mode` says.

    trained   with sqrt_dim: a learned module starts there, but for a cosine
    """
    if not isinstance(scaling, str) or scaling not in LEARNED:
        return named_scaling(scaling, LEARNED) if isinstance(scaling, str) else as_mode(scaling)
    if trained and scaling != LearnedCosine.name:
        options["mode"] = "sqrt_dim"
    return LEARNED[scaling](heads=heads, **options)
