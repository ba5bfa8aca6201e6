"""Kinds of attention layers, as a model's config and the code of its modules have them."""

from __future__ import annotations

import ast
import re
from collections.abc import Callable
from typing import Any

from .architecture import AttentionModule, entry_of_layer, interface_keywords, layer_type, parsed

_GLOBAL = ("full_attention", "cross_attention", "hybrid", "attention")
_WINDOWS = ("sliding_window", "sliding_window_size", "attention_chunk_size", "local_attention", "window_size")
_UNKNOWN = object()


def is_global(found: AttentionModule) -> bool | None:
    """True of a layer over all keys, False of one with a window or chunks, None where its config does not say."""
    kind, module = layer_type(found), found.module
    if re.search("sliding|chunk|local", kind):
        return False
    if kind not in _GLOBAL:
        return None
    reads_window = hasattr(module, "sliding_window") or "sliding_window" in (interface_keywords(type(module)) or ())
    is_said = kind == "cross_attention" or reads_window or entry_of_layer(found, "layer_types") is not None
    return True if is_said or not any(getattr(found.config, name, None) for name in _WINDOWS) else None


def window_size(found: AttentionModule) -> int | None:
    """The window or chunk of a layer, a number of tokens; None of other layers, and where the model does not say."""
    if is_global(found) is not False:
        return None
    names = ("attention_chunk_size",) if "chunk" in layer_type(found) else ("sliding_window", "sliding_window_size")
    sizes = [getattr(owner, name, None) for owner in (found.module, found.config) for name in names]
    return next((size for size in sizes if type(size) is int and size > 0), None)


def has_positions(found: AttentionModule) -> bool | None:
    """True of a layer with rotary positions or a bias of positions, None where neither config nor code say."""
    if "position_bias" in (interface_keywords(type(found.module)) or ()):
        return True  # Inkling, T5
    return is_rotary(found)


def is_rotary(found: AttentionModule) -> bool | None:
    """True of a layer that turns q and k by positions, None where neither config nor code say."""
    theta, ropes = entry_of_layer(found, "layer_rope_theta"), getattr(found.config, "rope_parameters", None)
    if theta is not None:
        return bool(theta)  # Granite, Muse
    if isinstance(ropes, dict) and (kind := layer_type(found)) in ropes:
        return ropes[kind] is not None  # Beam
    return _rotates(found.module)


def _is_without_positions(found: AttentionModule) -> bool | None:
    positions = has_positions(found)
    return None if positions is None else not positions


KINDS: dict[str, Callable[[AttentionModule], bool | None]] = {
    "global": is_global,
    "without positions": _is_without_positions,
}


def of_kind(kind: str, found: list[AttentionModule]) -> list[AttentionModule]:
    """The layers of a kind in KINDS that can be patched. Raises ValueError where one does not say, or none is."""
    chosen, able = [], [one for one in found if one.obstacle is None]
    for one in able:
        if (answer := KINDS[kind](one)) is None:
            raise ValueError(
                f"layers: expected a model that says which layers are {kind!r}, in its config or its code, got"
                f" {type(one.module).__name__} in {one.name}: give numbers or names, or a part of the model"
            )
        if answer:
            chosen.append(one)
    if not chosen:
        classes = ", ".join(dict.fromkeys(type(one.module).__name__ for one in able))
        raise ValueError(f"layers: expected a model with layers {kind!r}, got {len(able)} others ({classes})")
    return chosen


def _rotates(module: Any) -> bool | None:
    """True where the code around the module's attention turns q and k by positions; None where it does not say.

    Calls like apply_rotary_pos_emb are looked for, and the conditions around them, on attributes of the module, such as
    Llama 4's `if self.use_rope` and Cohere 2's `if self.sliding_window is not None`.
    """
    reached: list[bool | None] = []

    def visit(node: ast.AST, so_far: bool | None) -> None:
        if isinstance(node, ast.Call) and re.search("apply.*(rotary|rope)", ast.unparse(node.func)):
            reached.append(so_far)
        test = _truth(node.test, module) if isinstance(node, ast.If) else True
        for name, children in ast.iter_fields(node):
            met = _negated(test) if name == "orelse" and isinstance(node, ast.If) else test
            for child in children if isinstance(children, list) else [children]:
                if isinstance(child, ast.AST):
                    visit(child, _all(so_far, met))

    if (tree := parsed(type(module))) is not None:
        visit(tree, True)
    if True in reached:
        return True
    return False if reached and None not in reached else None


def _truth(test: ast.expr, module: Any) -> bool | None:
    """A condition on attributes of `self`, for this module; None where it is on others."""
    if isinstance(test, ast.BoolOp):
        values = [_truth(value, module) for value in test.values]
        return _all(*values) if isinstance(test.op, ast.And) else _negated(_all(*map(_negated, values)))
    if isinstance(test, ast.UnaryOp) and isinstance(test.op, ast.Not):
        return _negated(_truth(test.operand, module))
    if isinstance(test, ast.Compare) and len(test.ops) == 1 and isinstance(test.ops[0], (ast.Is, ast.IsNot)):
        left, right = (_value(side, module) for side in (test.left, test.comparators[0]))
        return None if _UNKNOWN in (left, right) else (left is right) == isinstance(test.ops[0], ast.Is)
    value = _value(test, module)
    return None if value is _UNKNOWN else bool(value)


def _value(node: ast.expr, module: Any) -> Any:
    if isinstance(node, ast.Constant):
        return node.value
    if isinstance(node, ast.Name):
        return module if node.id == "self" else _UNKNOWN
    if isinstance(node, ast.Attribute) and (owner := _value(node.value, module)) is not _UNKNOWN:
        return getattr(owner, node.attr, _UNKNOWN)
    return _UNKNOWN


def _all(*values: bool | None) -> bool | None:
    return False if False in values else None if None in values else True


def _negated(value: bool | None) -> bool | None:
    return None if value is None else not value
