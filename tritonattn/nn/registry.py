"""The learned scalings by name."""

from __future__ import annotations

from typing import Any

from ..scaling import Scaling
from ..scaling.names import parsed
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


def scaling_of_layer(scaling: Any, heads: int, **options: Any) -> Scaling:
    """The Scaling of a layer: of a name in LEARNED a new module, made with the options; others as `as_mode` says.

    A learned module starts as sqrt_dim, but for a cosine; with a trained length, "ssmax:64", from that base.
    """
    if not isinstance(scaling, str):
        return as_mode(scaling)
    mode, arguments = parsed(scaling, LEARNED)
    if mode.name not in LEARNED:
        return mode(**arguments)
    if not arguments and mode is not LearnedCosine:
        options["mode"] = "sqrt_dim"
    return mode(heads=heads, **arguments, **options)
