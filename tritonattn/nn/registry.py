"""The learned scalings by name."""

from __future__ import annotations

import math
from collections.abc import Collection
from typing import Any

from ..core.hints import warn
from ..core.ranges import window_sides
from ..scaling import LogKeyCount, LogPower, Scaling
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


def largest_base(scaling: Any) -> float:
    """The largest base of ln(n) in a scaling and the modes inside it, 0 without one.

    Where n stays below it, logits are smaller than those of sqrt_dim for good.
    """
    of_ln = isinstance(scaling, (LogKeyCount, LogPower, SSMax, LearnedLogPower))
    own = scaling.base if of_ln and getattr(scaling, "mode", None) is None else 0.0
    return max([own, *map(largest_base, _inside(scaling))])


def grows_with_keys(scaling: Any) -> bool:
    """True where a scaling, or a mode inside it, has a trained length beyond which it grows, or learns to."""
    grows = isinstance(scaling, Scaling) and scaling.trained_length != ""
    return grows or any(map(grows_with_keys, _inside(scaling)))


def _inside(scaling: Any) -> list[Scaling]:
    found = (getattr(scaling, name, None) for name in ("mode", "mode_a", "mode_b"))
    return [mode for mode in found if isinstance(mode, Scaling)]


def warn_of_layer(scaling: Any, causal: bool, window: tuple[int | None, int | None] | None, rotary: Any) -> None:
    """Warn of a base that a window's keys never reach, and of a factor where rotary positions keep it from its work."""
    left, right = window_sides(window)
    if left is None:
        if rotary is not None and grows_with_keys(scaling):
            warn(
                "rotary: expected a window, or no positions, in a layer whose factor grows with its keys: beyond the"
                " trained length rotary positions over all keys fail first, and the factor does not repair that"
            )
    elif right is not None or causal:
        most, base = 1 + left + (0 if causal else right or 0), largest_base(scaling)
        if base > most:
            warn(
                f"scaling: expected a base of at most {most}, the keys in window={window!r}, got {base:g}: logits stay"
                " below those of sqrt_dim"
            )


def scaling_of_layer(scaling: Any, heads: int, tied: Collection[str] = (), **options: Any) -> Scaling:
    """The Scaling of a layer: of a name in LEARNED a new module, made with the options; others as `as_mode` says.

    A learned module starts as sqrt_dim, but for a cosine; with a trained length, "ssmax:64", from that base. "ssmax"
    of which parameters are tied, as a model's s is, has b where that is tied too.
    """
    if not isinstance(scaling, str):
        return as_mode(scaling)
    mode, arguments = parsed(scaling, LEARNED)
    if mode.name not in LEARNED:
        return mode(**arguments)
    if mode is SSMax and tied:
        return SSMax(heads, arguments.get("base", math.e), bias="b" in tied, **options)
    if not arguments and mode is not LearnedCosine:
        options["mode"] = "sqrt_dim"
    return mode(heads=heads, **arguments, **options)
