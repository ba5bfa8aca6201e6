"""The configs that a patch writes to, and the entries that it writes."""

from __future__ import annotations

import copy
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from ..core.private_names import attribute
from .attention import NAME
from .masks import STATED
from .settings import ATTRIBUTE, LayerScaling

IMPLEMENTATION = "_attn_implementation_internal"  # the setter without "_internal" reaches into sub-configs
SAVED_IMPLEMENTATION = "attn_implementation"
_WRITTEN = frozenset((IMPLEMENTATION, SAVED_IMPLEMENTATION, ATTRIBUTE, STATED))


class PatchedConfigs:
    """Configs that a patch may write to until `undo`.

    copied     copies replace them all through the model, since other models may share them; a model that is being
               loaded writes to the originals. Entries that are written to a copy meanwhile, such as use_cache
               or a new vocab_size, go to its original at `undo`
    writable   the configs to write to
    """

    def __init__(self, model: nn.Module, configs: list[Any], copied: bool) -> None:
        self._model = model
        self.originals = configs
        self._before = [dict(vars(config)) for config in configs]
        self.writable = [copy.copy(config) if copied else config for config in configs]
        self._exchange(configs, self.writable)

    def undo(self) -> None:
        original_of = dict(zip(map(id, self.writable), self.originals, strict=True))
        self._exchange(self.writable, self.originals)
        for original, written, before in zip(self.originals, self.writable, self._before, strict=True):
            if written is original:
                for name in _WRITTEN:
                    vars(written).pop(name, None)
                vars(written).update({name: before[name] for name in _WRITTEN & before.keys()})
                continue
            for name, value in vars(written).items():
                value = original_of.get(id(value), value)
                is_new = name not in before or before[name] is not value
                if is_new and name not in _WRITTEN:
                    vars(original)[name] = value
        self.originals, self.writable, self._before = [], [], []

    def _exchange(self, present: list[Any], wanted: list[Any]) -> None:
        """Put each wanted config wherever the model, or another wanted one, holds the present one."""
        other = dict(zip(map(id, present), wanted, strict=True))
        for holder in (*self._model.modules(), *wanted):
            for name, value in vars(holder).items():
                if id(value) in other:
                    vars(holder)[name] = other[id(value)]


def install(module: Any, layer: LayerScaling, implementation: str) -> None:
    """Add the child to an attention module, whose config becomes a copy that names the implementation."""
    layer.shared = module.config
    module.config = copy.copy(module.config)
    setattr(module.config, IMPLEMENTATION, implementation)
    layer.train(module.training)
    weight = next(module.parameters(), None)
    if weight is not None:
        layer.to(weight.device)
    module.add_module(ATTRIBUTE, layer)


def state_masks(model: nn.Module) -> None:
    """Ask for explicit masks in models that take tritonattn's masks and do not support SDPA.

    The layers of such a model never needed their is_causal flags, which may be wrong.
    """
    for module in model.modules():
        if isinstance(module, PreTrainedModel) and not attribute(module, "transformers.PreTrainedModel._supports_sdpa"):
            if module.config._attn_implementation == NAME:
                setattr(module.config, STATED, True)
