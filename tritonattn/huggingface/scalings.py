"""Scalings of attention modules: built from what a user names, and written into a config and read from it."""

from __future__ import annotations

import copy
import dataclasses
from typing import Any

from torch import nn

from ..scaling import SCALINGS, Scaling
from ..validation import named_scaling, refuse_scaling


def built(scaling: Any, heads: int) -> Scaling | float | None:
    """The scaling of one attention module with that many query heads; a learned one is a new module each time.

    Raises TypeError or ValueError for what is no scaling.
    """
    if scaling is None:
        return None
    if isinstance(scaling, (int, float)) and not isinstance(scaling, bool):
        return float(scaling)
    if isinstance(scaling, str):
        return named_scaling(scaling)
    if isinstance(scaling, type) and issubclass(scaling, Scaling):
        return scaling(heads) if issubclass(scaling, nn.Module) else scaling()
    if not isinstance(scaling, Scaling):
        refuse_scaling(scaling)
    return copy.deepcopy(scaling) if isinstance(scaling, nn.Module) else scaling


def described(scaling: Any) -> Any:
    """A scaling as JSON: its name, or a dict of its name and parameters."""
    if not isinstance(scaling, Scaling):
        return scaling
    name = getattr(scaling, "name", type(scaling).__name__)
    parameters = dataclasses.asdict(scaling) if dataclasses.is_dataclass(scaling) else {}
    return {"name": name, **parameters} if parameters else name


def restored(saved: Any, heads: int | None = None) -> Scaling | float | None:
    """The scaling that `described` wrote; anything else that `tritonattn.attention` takes comes back as it is."""
    if not isinstance(saved, (str, dict)):
        return saved
    name = saved if isinstance(saved, str) else saved.get("name")
    parameters = {} if isinstance(saved, str) else {key: value for key, value in saved.items() if key != "name"}
    if name not in SCALINGS:
        raise ValueError(
            f"config.tritonattn: scaling {name!r} is not in tritonattn.SCALINGS; a Scaling of your own has to be put"
            f" there, as SCALINGS[{name!r}] = its class, before the model is loaded"
        )
    return SCALINGS[name](**parameters)
