"""transformers' continuous batching (`generate_batch`) of models whose attention is tritonattn's.

Requests are packed one after another, over keys that a paged cache has read. transformers passes them without masks,
with their ends, only to an implementation with "flash" in its name. So a config that names "tritonattn" names PACKED,
the same function, while a manager serves its model. transformers logs an error in a manager's loop and returns without
results; for such a model `stop`, with which `generate_batch` ends, raises it.

Up to 5.19 the attention function itself has to read the cache, and such models are refused. Run with 5.24; seen to
refuse with 4.54, 4.57, 5.0, 5.8 and 5.19.
"""

from __future__ import annotations

from typing import Any

import transformers
from packaging.version import Version
from torch import nn
from transformers import PreTrainedModel
from transformers.generation import continuous_batching

from ..core.extension import extend
from .architecture import attention_modules, interface_keywords
from .attention import NAME, register
from .configs import IMPLEMENTATION
from .settings import layer_scaling

PACKED = f"{NAME}_flash"
_SINCE = "5.24"
_RENAMED = "_tritonattn_renamed"


def follow_continuous_batching() -> None:
    """Let managers of continuous batching serve models with attention of tritonattn. Repeating it is harmless."""
    manager: Any = continuous_batching.ContinuousBatchingManager
    if Version(transformers.__version__) < Version(_SINCE):
        extend(manager, "__init__", _refusing)
        return
    register(PACKED)
    extend(manager, "switch_to_cb_friendly_attn", _renaming)
    extend(manager, "stop", _renaming_back)


def _refusing(original: Any) -> Any:
    def init(self: Any, model: Any, *args: Any, **kwargs: Any) -> None:
        if _uses_tritonattn(model):
            raise NotImplementedError(
                f"model: continuous batching of a model with attention of tritonattn needs transformers {_SINCE} or"
                f" newer, got {transformers.__version__}: use generate()"
            )
        original(self, model, *args, **kwargs)

    return init


def _renaming(original: Any) -> Any:
    def switch(self: Any, model: Any, auto_switch_to_flash: bool = True) -> None:
        if _uses_tritonattn(model):
            auto_switch_to_flash = False  # layers that are not patched need masks, as these read them
            implementation = model.config._attn_implementation
            if "flash" in (implementation or "") and implementation != PACKED:
                raise ValueError(
                    f"model: expected the attention implementation {NAME!r}, 'sdpa' or 'eager' in continuous batching"
                    f" of a patched model, got {implementation!r}: call model.set_attn_implementation({NAME!r}), or"
                    " 'sdpa' if only some layers are patched"
                )
            _refuse_dropped_softcap(model)
            setattr(self, _RENAMED, _rename(model))
        original(self, model, auto_switch_to_flash)

    return switch


def _renaming_back(original: Any) -> Any:
    def stop(self: Any, *args: Any, keep_for_next_session: bool = False, **kwargs: Any) -> None:
        try:
            original(self, *args, keep_for_next_session=keep_for_next_session, **kwargs)
        finally:
            for config in self.__dict__.pop(_RENAMED, ()):
                setattr(config, IMPLEMENTATION, NAME)
        error = self.background_thread_status.fatal_error
        if error is not None and _uses_tritonattn(self.model):
            if not keep_for_next_session:
                self.destroy()
            raise RuntimeError(
                f"continuous batching of a model with attention of tritonattn failed: {error}"
            ) from error

    return stop


def _uses_tritonattn(model: nn.Module) -> bool:
    return any(
        (isinstance(module, PreTrainedModel) and module.config._attn_implementation in (NAME, PACKED))
        or not getattr(layer_scaling(module), "temporary", True)
        for module in model.modules()
    )


def _refuse_dropped_softcap(model: nn.Module) -> None:
    """Refuse layers for which transformers has no softcap here: the eager attention of a manager drops it."""
    for one in attention_modules(model):
        softcap = getattr(one.module, "attn_logit_softcapping", None)
        is_eager = layer_scaling(one.module) is None and "eager" in (one.config._attn_implementation or "eager")
        if is_eager and softcap is not None and "softcap" in (interface_keywords(type(one.module)) or ()):
            raise NotImplementedError(
                f"layers: continuous batching of a model with a softcap needs all its layers patched, got"
                f" {one.name} left to transformers, whose eager attention drops its softcap {softcap:g} there: patch"
                ' all layers, with "sqrt_dim" those that are to stay as they are, or use generate()'
            )


def _rename(model: nn.Module) -> list[Any]:
    """Let configs that name "tritonattn" name PACKED, and return them."""
    configs = {id(one.config): one.config for one in model.modules() if isinstance(one, PreTrainedModel)}
    renamed = [one for one in configs.values() if one._attn_implementation == NAME]
    for one in renamed:
        setattr(one, IMPLEMENTATION, PACKED)
    return renamed
