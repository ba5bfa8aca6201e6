"""The configs that a patch writes to, and the entries that it writes."""

from __future__ import annotations

import copy
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from .attention import NAME
from .masks import STATED
from .settings import ATTRIBUTE, LayerScaling

IMPLEMENTATION = "_attn_implementation_internal"  # the setter without "_internal" reaches into sub-configs
SAVED_IMPLEMENTATION = "attn_implementation"
_WRITTEN = frozenset((IMPLEMENTATION, SAVED_IMPLEMENTATION, ATTRIBUTE, STATED))


class OwnConfigs:
    """Configs that a patch may write to until `undo`.

    copied   whether copies take their place all through the model, since other models may share them; a model that
             is being loaded writes to its own. Entries that are written to a copy meanwhile, such as use_cache or a
             new vocab_size, go to its original at `undo`
    """

    def __init__(self, model: nn.Module, configs: list[Any], copied: bool) -> None:
        self._model = model
        self._pairs = [(config, copy.copy(config) if copied else config) for config in configs]
        self._before = [dict(vars(config)) for config in configs]
        self._exchange(self._pairs)

    @property
    def own(self) -> list[Any]:
        """The configs to write to."""
        return [own for _, own in self._pairs]

    def undo(self) -> None:
        original_of = {id(own): original for original, own in self._pairs}
        self._exchange([(own, original) for original, own in self._pairs])
        for (original, own), before in zip(self._pairs, self._before, strict=True):
            if own is original:
                for name in _WRITTEN:
                    vars(own).pop(name, None)
                vars(own).update({name: before[name] for name in _WRITTEN & before.keys()})
                continue
            for name, value in vars(own).items():
                value = original_of.get(id(value), value)
                is_new = name not in before or before[name] is not value
                if is_new and name not in _WRITTEN:
                    vars(original)[name] = value
        self._pairs, self._before = [], []

    def _exchange(self, pairs: list[tuple[Any, Any]]) -> None:
        """Put the second of every pair wherever the model, or another second one, holds the first."""
        other = {id(one): two for one, two in pairs}
        for holder in (*self._model.modules(), *other.values()):
            for name, value in vars(holder).items():
                if id(value) in other:
                    vars(holder)[name] = other[id(value)]


def install(module: Any, own: LayerScaling, implementation: str) -> None:
    """Give an attention module `own` as its child, and a config of its own that names the implementation."""
    own.shared = module.config
    module.config = copy.copy(module.config)
    setattr(module.config, IMPLEMENTATION, implementation)
    own.train(module.training)
    weight = next(module.parameters(), None)
    if weight is not None:
        own.to(weight.device)
    module.add_module(ATTRIBUTE, own)


def state_masks(model: nn.Module) -> None:
    """Ask for explicit masks in models that take tritonattn's masks and do not support SDPA.

    The layers of such a model never needed their is_causal flags, which may be wrong.
    """
    for module in model.modules():
        if not isinstance(module, PreTrainedModel) or module._supports_sdpa:
            continue
        if module.config._attn_implementation == NAME:
            setattr(module.config, STATED, True)
