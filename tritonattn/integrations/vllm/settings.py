"""Settings and weights of a patched model in vLLM: from a checkpoint, or settings from additional_config."""

from __future__ import annotations

import difflib
from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn

from ...core.extension import extend
from ...huggingface.settings import ATTRIBUTE
from ..serving.settings import saved_settings as of_checkpoint
from ..serving.settings import without_learned


def asked_settings(config: Any) -> Any | None:
    """The entry `tritonattn` of a VllmConfig's additional_config. Raises ValueError for a misspelt name."""
    asked = config.additional_config
    if not isinstance(asked, dict):
        return None
    for name in asked.keys() - {ATTRIBUTE}:
        letters = "".join(filter(str.isalpha, str(name).lower()))
        if difflib.get_close_matches(letters, [ATTRIBUTE], cutoff=0.8):
            raise ValueError(f"additional_config: expected the key {ATTRIBUTE!r}, got {name!r}")
    return asked.get(ATTRIBUTE)


def saved_settings(config: Any) -> Any | None:
    """The settings asked for, or else the entry `tritonattn` of the checkpoint's config; None where that is empty."""
    if (asked := asked_settings(config)) is not None or config.model_config is None:
        return asked
    return of_checkpoint(config.model_config)


def take_learned(loader: Any) -> None:
    """Make a class of vLLM's loaders hand a patch's learned values to the layers' implementations alone. Repeatable."""
    extend(loader, "get_all_weights", _extended)


def _extended(get_all_weights: Any) -> Any:
    def weights(loader: Any, model_config: Any, model: nn.Module) -> Iterator[tuple[str, Tensor]]:
        learned: dict[str, dict[str, Tensor]] = {}
        takers: list[Any] = [impl for x in model.modules() if hasattr(impl := getattr(x, "impl", None), "learned")]
        for impl in takers:
            impl.learned = learned
        is_patched = any(impl.saved is not None for impl in takers)
        read = get_all_weights(loader, model_config, model)
        yield from without_learned(read, learned if takers else None, is_patched)

    return weights
