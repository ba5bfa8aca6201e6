"""Scalings of vLLM's attention layers: from a checkpoint's config and weights, or from additional_config."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from ...calls.factor import Factor
from ...core.statistics import Statistics
from ...core.visibility import Visibility
from ...huggingface.attention import scaling_arguments
from ...huggingface.settings import ATTRIBUTE, MARK, LayerScaling, Settings, saved_layers
from . import EXTENDED

_CHILD = f".{ATTRIBUTE}."


def saved_settings(config: Any) -> Any | None:
    """The entry `tritonattn` of a VllmConfig: of its additional_config, or else of the checkpoint's config."""
    asked = config.additional_config
    if isinstance(asked, dict) and asked.get(ATTRIBUTE) is not None:
        return asked[ATTRIBUTE]
    if config.model_config is None:
        return None
    configs = (config.model_config.hf_config, config.model_config.hf_text_config)
    return next((own for one in configs if (own := getattr(one, ATTRIBUTE, None)) is not None), None)


def layer_settings(saved: Any, layer: str, layers: tuple[str, ...], heads: int) -> tuple[str | None, Settings]:
    """The settings of one of vLLM's attention layers, and the saved module's name; None where they are for all.

    layers   names of all attention layers of the model
    heads    query heads of the whole model's layer, on all ranks
    """
    by_name = saved_layers(saved)
    if by_name is None:
        return None, Settings.from_config(saved or {}, entry=ATTRIBUTE)
    name = _places(tuple(by_name), layers).get(layer)
    if name is None:
        return None, Settings()
    return name, Settings.from_config(by_name[name], heads, f"{ATTRIBUTE}.layers[{name!r}]")


@functools.lru_cache(maxsize=8)
def _places(names: tuple[str, ...], layers: tuple[str, ...]) -> dict[str, str]:
    """The saved module's name by vLLM's name of the layer.

    The ends of the names are equal, from before the layer's number on: vLLM may order what comes before otherwise, and
    adds ".attn". Raises ValueError for a name that is no layer's or several layers'.
    """
    places: dict[str, str] = {}
    for name in names:
        ends = {layer: _common_end(name, layer.removesuffix(".attn")) for layer in layers}
        longest = max(ends.values(), key=len, default=[])
        found = [layer for layer, end in ends.items() if len(end) == len(longest)]
        if len(found) != 1 or found[0] in places or not any(part.isdigit() for part in longest):
            raise ValueError(
                f"{ATTRIBUTE}.layers[{name!r}]: expected the name of one attention layer of the model, which has"
                f" {', '.join(layers) or 'none'}"
            )
        places[found[0]] = name
    return places


def _common_end(a: str, b: str) -> list[str]:
    parts = []
    for x, y in zip(reversed(a.split(".")), reversed(b.split(".")), strict=False):
        if x != y:
            break
        parts.append(x)
    return parts


def take_learned(loader: Any) -> None:
    """Let a class of vLLM's loaders hand what a patch has learned to the layers' implementations, and no further.

    No module of vLLM's models has such weights, and models refuse those that they do not know. Repeatable.
    """
    get_all_weights = loader.get_all_weights
    if hasattr(get_all_weights, EXTENDED):
        return

    @functools.wraps(get_all_weights)
    def weights(loader: Any, model_config: Any, model: nn.Module) -> Iterator[tuple[str, Tensor]]:
        learned: dict[str, dict[str, Tensor]] = {}
        takers: list[Any] = [impl for x in model.modules() if hasattr(impl := getattr(x, "impl", None), "learned")]
        for impl in takers:
            impl.learned = learned
        for name, tensor in get_all_weights(loader, model_config, model):
            module, child, key = name.partition(_CHILD)
            if child and takers:
                learned.setdefault(module, {})[key] = tensor.clone()
            elif name != MARK:
                yield name, tensor

    setattr(weights, EXTENDED, True)
    loader.get_all_weights = weights


def with_learned(settings: Settings, name: str, learned: dict[str, Tensor], rank: int, ranks: int) -> Settings:
    """Settings with the values learned by the saved module `name`, those per head for the heads of one rank.

    Raises ValueError for values that are missing, unexpected or of another shape.
    """
    own = LayerScaling(settings)
    wanted = own.state_dict()
    if wanted.keys() != learned.keys() or any(x.shape != learned[key].shape for key, x in wanted.items()):
        shapes = [{key: list(x.shape) for key, x in values.items()} for values in (wanted, learned)]
        raise ValueError(f"{name}{_CHILD[:-1]}: expected weights {shapes[0]}, got {shapes[1]}")
    own.load_state_dict(learned)
    for parameter in own.parameters():
        parameter.requires_grad_(False)
        if parameter.dim() and parameter.shape[0] > 1:  # one value a head
            heads = parameter.shape[0] // ranks
            parameter.data = parameter.data.narrow(0, rank * heads, heads)
    return Settings(own.scaling, own.gain, own.backend, own.batch_invariant)


def call_arguments(settings: Settings, scale: float, head_size: int) -> dict[str, Any]:
    """Arguments of `attention_decode` and `attention_varlen` for a layer that scales by `scale` without a patch."""
    arguments = scaling_arguments(settings, scale, head_size)
    return {**arguments, "backend": settings.backend, "batch_invariant": settings.batch_invariant}


def reads_lengths(scaling: Any, gain: Any, shape: tuple[int, int, int]) -> bool:
    """Whether a scaling takes the lengths of keys, on a CPU; shape is Hq, Hkv, D."""
    q_heads, kv_heads, head_size = shape
    read = []
    q, k = (torch.zeros(1, heads, 1, head_size, dtype=torch.float32, device="cpu") for heads in (q_heads, kv_heads))
    visibility = Visibility.of(q, k, causal=True)
    statistics = Statistics(lambda: read.append(True) or k, visibility)
    Factor.of(scaling, gain, q, (1, q_heads, 1), "[1, Hq, 1]").scales(q, k, visibility, statistics)
    return bool(read)
