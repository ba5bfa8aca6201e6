"""The layers of a model that `patch` was asked for, and what for each."""

from __future__ import annotations

from collections.abc import Mapping
from fnmatch import fnmatchcase
from typing import Any

from ..core.hints import shortened, type_of
from .architecture import AttentionModule
from .kinds import KINDS, of_kind

Selector = int | str

_DEFAULTS = {"scaling": "sqrt_dim", "gain": None, "backend": "auto"}


def wishes_of(found: list[AttentionModule], layers: Any, common: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """The scaling, gain and backend asked for each chosen module, by its name."""
    if layers is None:
        return {one.name: common for one in found if one.obstacle is None}
    if isinstance(layers, (int, str)):
        layers = [layers]
    asked_for = layers.items() if isinstance(layers, Mapping) else [(selector, None) for selector in layers]
    wishes: dict[str, dict[str, Any]] = {}
    depths: dict[str, int] = {}
    for one in found:
        depths[one.stack] = max(depths.get(one.stack, 0), 1 + (one.number or 0))
    for selector, wish in asked_for:
        if isinstance(selector, str) and selector in KINDS:
            matching = of_kind(selector, found)
        else:
            matching = [one for one in found if _matches(selector, one, depths)]
        if not matching:
            most = max((depths[one.stack] for one in found if one.number is not None), default=0)
            numbers = f"numbers from {-most} to {most - 1}, " if most else ""
            kinds = ", ".join(map(repr, KINDS))
            names = shortened([one.name for one in found if one.obstacle is None])
            raise ValueError(
                f"layers: expected {numbers}names or patterns of {names}, {kinds} or None for all, got {selector!r}"
            )
        able = [one for one in matching if one.obstacle is None]
        if not able:
            name, module = matching[0].name, type(matching[0].module).__name__
            raise NotImplementedError(f"layers: {name} ({module}) cannot be patched: {matching[0].obstacle}")
        asked = wish if isinstance(wish, dict) else {} if wish is None else {"scaling": wish}
        if unknown := asked.keys() - common.keys():
            raise ValueError(f"layers: expected {', '.join(map(repr, common))}, got {', '.join(map(repr, unknown))}")
        wishes.update({one.name: {**common, **asked} for one in able})
    if not wishes:
        raise ValueError("layers: expected at least one layer, got none")
    for name, value in common.items():
        if value is not None and value != _DEFAULTS[name] and all(wish[name] is not value for wish in wishes.values()):
            raise ValueError(
                f"{name}: expected a layer that takes it, got {type_of(value)}, and a {name} of its own for each of"
                f" layers: name the others too, layers={{'*': {{}}, ...}}, or leave {name} out"
            )
    return wishes


def _matches(selector: Any, one: AttentionModule, depths: dict[str, int]) -> bool:
    if isinstance(selector, bool) or not isinstance(selector, (int, str)):
        raise TypeError(f"layers: expected numbers or names, got {type(selector).__name__}")
    if isinstance(selector, int):
        return one.number is not None and one.number == selector + depths[one.stack] * (selector < 0)
    names = {one.name, one.saved_name or one.name}
    return any(fnmatchcase(name, selector) or name.startswith(f"{selector}.") for name in names)
