"""Scalings of attention modules: built from what a user names, and written into a config and read from it."""

from __future__ import annotations

import copy
import dataclasses
from typing import Any

from torch import nn

from ..calls.checks import refuse_scaling
from ..nn import LEARNED, Cosine, PerHead, Scheduled, SSMax
from ..nn.learned import Learned
from ..nn.registry import named
from ..scaling import SCALINGS, Scaling


def built(scaling: Any, heads: int) -> Any:
    """The scaling of one attention module with that many query heads: a Scaling, a float or None.

    A learned one is a new module each time. Raises TypeError or ValueError for what is no scaling.
    """
    if scaling is None:
        return None
    if isinstance(scaling, (int, float)) and not isinstance(scaling, bool):
        return float(scaling)
    if isinstance(scaling, str):
        return named(scaling, heads)
    if isinstance(scaling, type) and issubclass(scaling, Scaling):
        return scaling(heads=heads) if issubclass(scaling, nn.Module) else scaling()
    if not isinstance(scaling, Scaling):
        refuse_scaling(scaling)
    if not isinstance(scaling, nn.Module):
        return scaling
    for part in scaling.modules():
        if isinstance(part, Learned) and part.heads != heads:
            raise ValueError(f"scaling: expected {type(part).__name__} of {heads} heads, got one of {part.heads}")
    return copy.deepcopy(scaling)


def described(scaling: Any) -> Any:
    """A scaling as JSON: its name, or a dict of its name and arguments. What it has learned is in the state_dict."""
    if not isinstance(scaling, Scaling):
        return scaling
    name, arguments = getattr(scaling, "name", type(scaling).__name__), {}
    if dataclasses.is_dataclass(scaling):
        arguments = dataclasses.asdict(scaling)
    elif isinstance(scaling, Cosine):
        arguments = {"tau": getattr(scaling.mode, "tau", None)}
    elif isinstance(scaling, PerHead):
        arguments = {"mode": described(scaling.mode)}
    elif isinstance(scaling, SSMax):
        arguments = {"bias": scaling.b is not None}
    elif isinstance(scaling, Scheduled):
        modes = {"mode_a": described(scaling.mode_a), "mode_b": described(scaling.mode_b)}
        arguments = {**modes, "steps": scaling.steps, "blend": scaling.blend}
    return {"name": name, **arguments} if arguments else name


def restored(saved: Any, heads: int | None = None) -> Any:
    """The scaling that `described` wrote; anything else that `tritonattn.attention` takes comes back as it is.

    heads   the query heads of its attention module; None refuses what has parameters of its own
    """
    if not isinstance(saved, (str, dict)):
        return saved
    arguments: dict[str, Any] = {} if isinstance(saved, str) else dict(saved)
    name = str(saved if isinstance(saved, str) else arguments.pop("name", None))
    for mode in arguments.keys() & {"mode", "mode_a", "mode_b"}:
        arguments[mode] = restored(arguments[mode], heads)
    cls = SCALINGS.get(name) or LEARNED.get(name) or {Scheduled.name: Scheduled}.get(name)
    if cls is None:
        raise ValueError(
            f"config.tritonattn: scaling {name!r} is not in tritonattn.SCALINGS; a Scaling of your own has to be put"
            f" there, as SCALINGS[{name!r}] = its class, before the model is loaded"
        )
    if issubclass(cls, nn.Module) and heads is None:
        raise ValueError(
            f"config.tritonattn: scaling {name!r} has parameters of its own, which every layer needs for itself: use"
            f" tritonattn.huggingface.patch(model, scaling={name!r})"
        )
    if issubclass(cls, nn.Module) and cls is not Scheduled:
        arguments["heads"] = heads
    return cls(**arguments)
