"""Tensors of a checkpoint that say how a layer scales its logits, and that the model's code does not have."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from torch import nn
from transformers.utils.hub import cached_file

from ..core.hints import shortened, warn
from .architecture import AttentionModule, outermost_models

_WEIGHTS = ("model.safetensors.index.json", "model.safetensors")
_NAMED = "ssmax"  # ssmax_scale of OLMo 3.5's hybrids, ssmax_s of Step-5


def warn_of_ignored(model: nn.Module, found: list[AttentionModule]) -> None:
    """Warn of a checkpoint's learned scalings of attention layers that loading leaves out as unexpected weights."""
    for root in outermost_models(model).values():
        scalings = [name for name in _saved_names(root) if _NAMED in name.rpartition(".")[2]]
        if not scalings:
            continue
        layers = {_bare(root, layer.saved_name) for layer in found if layer.saved_name is not None}
        held = {_bare(root, name) for name, _ in (*root.named_parameters(), *root.named_buffers())}
        bare_names = {name: _bare(root, name) for name in scalings}
        ignored = [x for x, bare in bare_names.items() if bare not in held and bare.rpartition(".")[0] in layers]
        if ignored:
            warn(
                f"model: expected one that has the learned scalings of its checkpoint, got a {type(root).__name__}"
                f" without {shortened(ignored)}, which loading leaves out as unexpected: register parameters of these"
                " names in its attention modules, load it again, and name them by parameters="
            )


def _bare(model: Any, name: str) -> str:
    """A name without that of the model inside of a model with a head."""
    return name.removeprefix(f"{model.base_model_prefix}.")


def _saved_names(model: Any) -> list[str]:
    """The names of weights in the safetensors of the checkpoint from which a model came; none where it is not here."""
    source = getattr(model.config, "_name_or_path", None)
    if not source:
        return []
    for name in _WEIGHTS:
        path = _file(str(source), name)
        if path is None:
            continue
        with path.open("rb") as opened:
            size = 0 if path.suffix == ".json" else int.from_bytes(opened.read(8), "little")  # of the header
            entries = json.loads(opened.read(size) if size else opened.read())
        return list(entries["weight_map"] if path.suffix == ".json" else entries)
    return []


def _file(source: str, name: str) -> Path | None:
    if Path(source).is_dir():
        path = Path(source) / name
        return path if path.is_file() else None
    try:
        found = cached_file(source, name, local_files_only=True)
    except OSError:  # not in the cache
        return None
    return None if found is None else Path(found)
