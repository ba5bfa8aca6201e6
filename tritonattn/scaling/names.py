"""The mode that a name selects, and the error for other names."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

from . import SCALINGS, Scaling

# Modes that are modules, and the expression that makes one for q of Hq heads.
_LEARNED = {
    "ssmax": "SSMax(heads=Hq)",
    "power_law": "PowerLaw(heads=Hq)",
    "learned_log_power": "LearnedLogPower(heads=Hq)",
    "query_adaptive_ssmax": "QueryAdaptiveSSMax(heads=Hq, head_dim=D)",
    "per_head": "PerHead('sqrt_dim', heads=Hq)",
    "learned_cosine": "LearnedCosine(heads=Hq)",
    "scheduled": "Scheduled('sqrt_dim', 'key_norm_mean', steps=1000)",
}


def named_scaling(name: str, learned: Iterable[str] = ()) -> Scaling:
    """The mode of a name in SCALINGS, with its defaults; a caller makes those that are `learned` itself."""
    if name in SCALINGS:
        return SCALINGS[name]()
    if name in _LEARNED:
        raise ValueError(
            f"scaling: expected a mode without a state of its own, got {name!r}, which is a module: make it once, keep"
            f" it with the model, and pass it, scaling=tritonattn.nn.{_LEARNED[name]}"
        )
    known = [*SCALINGS, *learned]
    close = difflib.get_close_matches(name, known, n=1)
    hint = f" (did you mean {close[0]!r}?)" if close else ""
    raise ValueError(f"scaling: expected one of {', '.join(known)}, got {name!r}{hint}")
