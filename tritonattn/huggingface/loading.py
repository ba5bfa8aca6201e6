"""A saved model's scalings, applied when it is loaded.

`patch` writes them into the config, together with attn_implementation = "tritonattn", so that a process without
`tritonattn.huggingface` refuses the checkpoint instead of computing something else. With it, every model finds the
settings at the end of its construction, before its weights are read.
"""

from __future__ import annotations

import functools
import warnings
from typing import Any

from transformers import PreTrainedModel

from .architecture import AttentionModule, attention_modules, query_heads
from .attention import NAME
from .patching import Patched, apply, patched
from .settings import ATTRIBUTE, LAYERS, LayerScaling

_FOLLOWS = "_follows_tritonattn_settings"


def restore(model: PreTrainedModel) -> Patched:
    """Apply the settings in model.config that a `patch` left there; learned values start anew.

    Raises ValueError where the config has none, or the model lacks a module that they name.
    """
    saved = getattr(model.config, ATTRIBUTE, None)
    if not isinstance(saved, dict) or LAYERS not in saved:
        raise ValueError(f"model: config.{ATTRIBUTE} holds no scalings of layers")
    found = attention_modules(model)
    places = _places(model, found, saved[LAYERS])
    missing = [name for name in saved[LAYERS] if name not in places]
    if missing:
        raise ValueError(f"model: {type(model).__name__} has no {', '.join(missing)}, which config.{ATTRIBUTE} names")
    return _apply(model, found, places, saved[LAYERS])


def follow_saved_settings() -> None:
    """Let every model apply the settings in its config at the end of its construction. Repeating it is harmless."""
    if getattr(PreTrainedModel.post_init, _FOLLOWS, False):
        return
    original = PreTrainedModel.post_init

    @functools.wraps(original)
    def post_init(self: PreTrainedModel) -> None:
        original(self)
        _follow(self)

    setattr(post_init, _FOLLOWS, True)
    PreTrainedModel.post_init = post_init


def _follow(model: PreTrainedModel) -> None:
    saved = getattr(model.config, ATTRIBUTE, None)
    if not isinstance(saved, dict) or LAYERS not in saved:
        return
    # A model is made of models that share its config: the outer one takes over what an inner one has applied.
    inner = [one for module in model.modules() if (one := patched(module)) is not None]
    if not inner and model.config._attn_implementation != NAME:
        warnings.warn(
            f"{type(model).__name__}: the scalings in config.{ATTRIBUTE} are not applied, since attn_implementation is"
            f" {model.config._attn_implementation!r}; wanted {NAME!r}, or none",
            stacklevel=4,
        )
        return
    for one in inner:
        one.undo()
    found = attention_modules(model)
    places = _places(model, found, saved[LAYERS])
    if len(places) == len(saved[LAYERS]):  # else the first call says what is missing
        _apply(model, found, places, saved[LAYERS])


def _places(model: PreTrainedModel, found: list[AttentionModule], saved: dict[str, Any]) -> dict[str, AttentionModule]:
    """The modules of saved names, which may have been those of the model with or without its head."""
    prefix = f"{model.base_model_prefix}."
    by_name = {one.name: one for one in found if one.obstacle is None}
    places = {}
    for name in saved:
        for candidate in (name, name.removeprefix(prefix), prefix + name):
            if candidate in by_name:
                places[name] = by_name[candidate]
                break
    return places


def _apply(
    model: PreTrainedModel, found: list[AttentionModule], places: dict[str, AttentionModule], saved: dict[str, Any]
) -> Patched:
    plans = {
        one.name: LayerScaling.from_saved(saved[name], one.module.config, query_heads(one.module))
        for name, one in places.items()
    }
    if model.config._attn_implementation == NAME and len(plans) < len(found):
        # The layers that were not patched take what they would have without tritonattn.
        model.config._attn_implementation = model.get_correct_attn_implementation(None)
    return apply(model, found, plans)
