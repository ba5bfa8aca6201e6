"""Scalings of attention modules: made from an argument of `patch`, and written into a config and read from it."""

from __future__ import annotations

import copy
import inspect
import math
import reprlib
from collections.abc import Collection
from numbers import Real
from typing import Any

from torch import Tensor, nn

from ..nn import LEARNED, LearnedCosine, LearnedLogPower, PowerLaw, QueryAdaptiveSSMax, Scheduled, SSMax
from ..nn.learned import Learned
from ..nn.registry import scaling_of_layer
from ..scaling import SCALINGS, Scaling
from ..scaling.names import is_required, parsed, refuse_scaling

_MODES = ("mode", "mode_a", "mode_b")  # arguments that are scalings
_DEPTH = 8  # scalings inside one another, at most
_STARTS = (SSMax, LearnedLogPower, PowerLaw, QueryAdaptiveSSMax)  # whose mode is where they start, by name
_OF_THE_LAYER = {"heads", "device", "dtype"}  # arguments that no config gives


def make_scaling(scaling: Any, heads: int, config: Any, tied: Collection[str] = ()) -> Any:
    """The scaling of one attention module with that many query heads: a Scaling, a float or None, as `patch` says.

    tied   its parameters that are going to be tied to the module's

    Raises TypeError or ValueError for anything else, ValueError for the name of a mode that is in the model's code.
    """
    if scaling is None:
        return None
    if isinstance(scaling, str) and (settings := _settings_in(config, scaling)):
        return SCALINGS[scaling](**settings)
    if isinstance(scaling, Real) and not isinstance(scaling, bool):
        return float(scaling)
    if isinstance(scaling, type) and scaling in LEARNED.values():
        scaling = scaling.name
    if isinstance(scaling, type) and issubclass(scaling, Scaling):
        parameters = inspect.signature(scaling).parameters
        if any(is_required(one) for name, one in parameters.items() if name != "heads"):
            refuse_scaling(scaling)
        return scaling(heads=heads) if issubclass(scaling, nn.Module) else scaling()
    if not isinstance(scaling, (str, Scaling)):
        refuse_scaling(scaling, "a name, a Scaling, a class of them, a float or None (gain= takes a tensor)")
    if not isinstance(scaling, Scaling) or not isinstance(scaling, nn.Module):
        return scaling_of_layer(scaling, heads, tied)
    for part in scaling.modules():
        if isinstance(part, Learned) and part.heads != heads:
            raise ValueError(f"scaling: expected {type(part).__name__} of {heads} heads, got one of {part.heads}")
    return copy.deepcopy(scaling)


def _settings_in(config: Any, mode: str) -> dict[str, Any]:
    """The settings of a mode that a model's config names; none where an entry is missing."""
    settings, about = {}, vars(SCALINGS.get(mode, Scaling)).get("about")
    for setting, path in about.config.items() if about else ():
        value = config
        for name in path.split("."):
            value = value.get(name) if isinstance(value, dict) else getattr(value, name, None)
        settings[setting] = value
    if None in settings.values():
        return {}
    if mode in modes_in_model(config):
        raise ValueError(
            f"scaling: expected another mode than {mode!r} for a {config.model_type}, whose code has multiplied q by"
            " it: 'sqrt_dim' is the model as it was"
        )
    return settings


def modes_in_model(config: Any) -> tuple[str, ...]:
    """The modes by which a model's code has multiplied q, in some layers at least, by its config."""
    has_factor = getattr(config, "attn_temperature_tuning", True)
    named = ((name, vars(mode).get("about")) for name, mode in SCALINGS.items() if has_factor)
    return tuple(name for name, about in named if about and getattr(config, "model_type", "") in about.models)


def to_config(scaling: Any, depth: int = 1) -> Any:
    """A scaling as JSON: its name, or a dict of its name and arguments. Learned values are in the state_dict."""
    if not isinstance(scaling, Scaling):
        return scaling
    _check_depth("scaling", depth)
    name = getattr(scaling, "name", type(scaling).__name__)
    if isinstance(scaling, LearnedCosine):
        arguments = {"tau": getattr(scaling.mode, "tau", None)}
    else:  # those that it keeps
        taken = inspect.signature(type(scaling)).parameters
        kept = {one: getattr(scaling, one) for one in taken if one not in _OF_THE_LAYER and hasattr(scaling, one)}
        if isinstance(scaling, _STARTS):  # by identity: a base of e that was asked for is not the one of no base
            kept = {one: x for one, x in kept.items() if x is not taken[one].default}
        arguments = {one: to_config(x, depth + 1) for one, x in kept.items() if not isinstance(x, Tensor)}
    return {"name": name, **arguments} if arguments else name


def from_config(saved: Any, heads: int | None, entry: str, depth: int = 1) -> Any:
    """The scaling that `to_config` wrote, or of "log_key_count:64", a name with a base. A `Scaling` stays as it is.

    heads   the query heads of its attention module; None refuses modes with parameters
    entry   of the config, for errors
    depth   scalings around this one, and itself

    Raises ValueError naming the entry.
    """
    _check_depth(entry, depth)
    if saved is None or isinstance(saved, Scaling) or is_finite(saved):
        return saved
    arguments: dict[str, Any] = dict(saved) if isinstance(saved, dict) else {"name": saved}
    if isinstance(saved, str) and ":" in saved:
        try:
            mode, settings = parsed(saved, LEARNED)
        except ValueError as error:
            raise ValueError(f"{entry}: {str(error).removeprefix('scaling: ')}") from error
        arguments = {"name": mode.name, **settings}
    name = arguments.pop("name", None)
    if not isinstance(name, str):
        raise ValueError(f"{entry}: expected a name, a dict with a name, a number or None, got {reprlib.repr(saved)}")
    cls = _class_of(name, heads, entry)
    taken = inspect.signature(cls).parameters.keys()
    check_entries(entry, arguments, taken - _OF_THE_LAYER)
    for mode in set() if cls in _STARTS else arguments.keys() & set(_MODES):
        arguments[mode] = from_config(arguments[mode], heads, f"{entry}.{mode}", depth + 1)
    if "heads" in taken:
        arguments["heads"] = heads
    try:
        return cls(**arguments)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{entry}: {name} cannot be made: {error}") from error


def _class_of(name: str, heads: int | None, entry: str) -> Any:
    others = {cls.name: cls for cls in (Scheduled, QueryAdaptiveSSMax)}
    cls = SCALINGS.get(name) or LEARNED.get(name) or others.get(name)
    if cls is None:
        raise ValueError(
            f"{entry}: expected a name in tritonattn.SCALINGS, got {name!r}; another Scaling has to be put there, as"
            f" SCALINGS[{name!r}] = its class, before the model is loaded"
        )
    if issubclass(cls, nn.Module) and heads is None:
        raise ValueError(
            f"{entry}: expected a scaling without parameters, which every layer needs for itself, got {name!r}: use"
            f" tritonattn.huggingface.patch(model, scaling={name!r})"
        )
    return cls


def check_entries(entry: str, saved: Any, known: Any) -> None:
    """Raise ValueError unless saved is a dict with keys out of `known`."""
    wanted = f"expected a dict with keys out of {', '.join(sorted(known)) or 'none'}"
    if not isinstance(saved, dict):
        raise ValueError(f"{entry}: {wanted}, got {reprlib.repr(saved)}")
    if unknown := [name for name in saved if name not in known]:
        raise ValueError(f"{entry}: {wanted}, got {', '.join(map(reprlib.repr, unknown))}")


def is_finite(x: Any) -> bool:
    """True for a finite number that is not a bool."""
    return isinstance(x, (int, float)) and not isinstance(x, bool) and math.isfinite(x)


def _check_depth(entry: str, depth: int) -> None:
    if depth > _DEPTH:
        raise ValueError(f"{entry}: expected at most {_DEPTH} scalings inside one another, got more")
