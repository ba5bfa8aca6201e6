"""The modes by name, and the error for other names."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any, NoReturn, cast

from .base import Scaling
from .constants import Dim, SqrtDim, Unscaled
from .cosine import Cosine
from .counts import KeyCount, LogKeyCount, LogPower, SqrtKeyCount
from .key_norms import KeyNormL2, KeyNormMax, KeyNormMean, KeyNormRms, KeyNormSum
from .positional import Beam, Inkling, Inkling2, Llama4, Ministral3, QwenLogn

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


if TYPE_CHECKING:
    from typing_extensions import TypedDict

    class Modes(TypedDict, extra_items=type[Scaling]):
        """Classes by name, with the arguments of each; a user's `Scaling` may be put there too."""

        sqrt_dim: type[SqrtDim]
        dim: type[Dim]
        none: type[Unscaled]
        key_count: type[KeyCount]
        sqrt_key_count: type[SqrtKeyCount]
        key_norm_sum: type[KeyNormSum]
        key_norm_mean: type[KeyNormMean]
        key_norm_rms: type[KeyNormRms]
        key_norm_max: type[KeyNormMax]
        key_norm_l2: type[KeyNormL2]
        log_key_count: type[LogKeyCount]
        log_power: type[LogPower]
        qwen_logn: type[QwenLogn]
        llama4: type[Llama4]
        ministral3: type[Ministral3]
        inkling: type[Inkling]
        inkling2: type[Inkling2]
        beam: type[Beam]
        cosine: type[Cosine]


class _Modes(dict[str, type[Scaling]]):
    """Classes of modes by name. Another name raises KeyError with the nearest one."""

    def __missing__(self, name: str) -> NoReturn:
        raise KeyError(_unknown(name, self))


_CLASSES = (SqrtDim, Dim, Unscaled, KeyCount, SqrtKeyCount, KeyNormSum, KeyNormMean, KeyNormRms, KeyNormMax, KeyNormL2)
_CLASSES += (LogKeyCount, LogPower, QwenLogn, Llama4, Ministral3, Inkling, Inkling2, Beam, Cosine)
SCALINGS: Modes = cast("Modes", _Modes({mode.name: mode for mode in _CLASSES}))


def named_scaling(name: str, learned: Iterable[str] = ()) -> Scaling:
    """The mode of a name in SCALINGS, with its defaults; a caller makes those that are `learned` itself."""
    if name in SCALINGS:
        return SCALINGS[name]()
    raise ValueError(_unknown(name, [*SCALINGS, *learned]))


def _unknown(name: Any, known: Iterable[str]) -> str:
    """The message for a name that selects no mode."""
    if name in _LEARNED:
        return (
            f"scaling: expected a mode without a state, got {name!r}, which is a module: make it once, keep"
            f" it with the model, and pass it, scaling=tritonattn.nn.{_LEARNED[name]}"
        )
    close = difflib.get_close_matches(str(name), known, n=1)
    hint = f" (did you mean {close[0]!r}?)" if close else ""
    return f"scaling: expected one of {', '.join(known)}, got {name!r}{hint}"
