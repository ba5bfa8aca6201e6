"""Scalings of a server's attention layers, from a checkpoint's config and weights."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from ...calls.checks import check
from ...calls.dispatch import logits
from ...core.call import Request
from ...core.statistics import Statistics
from ...core.terms import Terms
from ...core.visibility import Visibility
from ...huggingface.attention import scaling_arguments
from ...huggingface.scalings import to_config
from ...huggingface.settings import ATTRIBUTE, MARK, LayerScaling, Settings, saved_layers
from ...scaling import Scaling

_CHILD = f".{ATTRIBUTE}."


def saved_settings(model_config: Any) -> Any | None:
    """The entry `tritonattn` of the config of a server's model, None where that is empty."""
    configs = (model_config.hf_config, model_config.hf_text_config)
    return next((saved for one in configs if (saved := getattr(one, ATTRIBUTE, None))), None)


def layer_settings(saved: Any, layer: str, layers: tuple[str, ...], heads: int) -> tuple[str | None, Settings]:
    """The settings of one of a server's attention layers, and the saved module's name; None where they are for all.

    layers   names of all attention layers of the model
    heads    query heads of the whole model's layer, on all ranks
    """
    by_name = saved_layers(saved)
    if by_name is None:
        return None, Settings.from_config(saved or {}, entry=ATTRIBUTE)
    name = _saved_names(tuple(by_name), layers).get(layer)
    if name is None:
        return None, Settings()
    entry = f"{ATTRIBUTE}.layers[{name!r}]"
    settings = Settings.from_config(by_name[name], heads, entry)
    if settings.tied:
        raise NotImplementedError(
            f"{entry}.tied: expected a scaling with parameters of its own in a server, which would multiply q by the"
            f" model's {', '.join(settings.tied.values())} too, got {dict(settings.tied)}"
        )
    return name, settings


@functools.lru_cache(maxsize=8)
def _saved_names(names: tuple[str, ...], layers: tuple[str, ...]) -> dict[str, str]:
    """The saved module's name by the server's name of the layer.

    The ends of the names are equal, from before the layer's number on: a server may order what comes before otherwise,
    and adds ".attn". Raises ValueError for a name that is not a layer's or several layers'.
    """
    names_of: dict[str, str] = {}
    for name in names:
        ends = {layer: _common_end(name, layer.removesuffix(".attn")) for layer in layers}
        longest = max(ends.values(), key=len, default=[])
        found = [layer for layer, end in ends.items() if len(end) == len(longest)]
        if len(found) != 1 or found[0] in names_of or not any(part.isdigit() for part in longest):
            raise ValueError(
                f"{ATTRIBUTE}.layers[{name!r}]: expected the name of one attention layer of the model, which has"
                f" {', '.join(layers) or 'none'}"
            )
        names_of[found[0]] = name
    return names_of


def _common_end(a: str, b: str) -> list[str]:
    pairs = zip(reversed(a.split(".")), reversed(b.split(".")), strict=False)
    return [x for x, _ in itertools.takewhile(lambda pair: pair[0] == pair[1], pairs)]


def without_learned(
    weights: Iterable[tuple[str, Tensor]], learned: dict[str, dict[str, Tensor]] | None, is_patched: bool
) -> Iterator[tuple[str, Tensor]]:
    """A checkpoint's weights without a patch's learned values, which go to `learned` by the saved module's name.

    No module of a server's models has such weights. MARK stops a model without settings.
    """
    for name, tensor in weights:
        module, child, key = name.partition(_CHILD)
        if child and learned is not None:
            learned.setdefault(module, {})[key] = tensor.clone()
        elif name != MARK or not is_patched:
            yield name, tensor


def check_all_taken(saved: Any, learned: dict[str, dict[str, Tensor]]) -> None:
    """Raise ValueError where a checkpoint has learned values of a module that its settings do not name."""
    if unknown := learned.keys() - (saved_layers(saved) or {}).keys():
        raise ValueError(
            f"{ATTRIBUTE}.layers: expected settings of {', '.join(sorted(unknown))}, whose learned values are in the"
            " checkpoint, got none"
        )


def with_learned(settings: Settings, name: str, learned: dict[str, Tensor] | None, rank: int, ranks: int) -> Settings:
    """Settings with the values learned by the saved module `name`, those per head for the heads of one rank.

    learned   None keeps the values that learning begins with

    Raises ValueError for values that are missing, unexpected or of another shape.
    """
    layer = LayerScaling(settings)
    wanted = layer.state_dict()
    learned = wanted if learned is None else learned
    if wanted.keys() != learned.keys() or any(x.shape != learned[key].shape for key, x in wanted.items()):
        shapes = [{key: list(x.shape) for key, x in values.items()} for values in (wanted, learned)]
        raise ValueError(f"{name}{_CHILD[:-1]}: expected weights {shapes[0]}, got {shapes[1]}")
    layer.load_state_dict(learned)
    for parameter in layer.parameters():
        parameter.requires_grad_(False)
        if parameter.dim() and parameter.shape[0] > 1:  # one value per head
            heads = parameter.shape[0] // ranks
            parameter.data = parameter.data.narrow(0, rank * heads, heads)
    return Settings(layer.scaling, layer.gain, layer.backend, layer.batch_invariant)


@dataclass(frozen=True)
class Loaded:
    """The settings of a whole model, and the values that a loader read.

    saved      config.tritonattn
    learned    by the saved module's name; None keeps the values that learning begins with
    rank, ranks   of tensor parallelism
    """

    saved: Any
    learned: dict[str, dict[str, Tensor]] | None
    rank: int
    ranks: int

    def of(self, layer: str, layers: tuple[str, ...], heads: int) -> Settings:
        """The settings of one of the server's `layers`, which has `heads` query heads on this rank."""
        name, settings = layer_settings(self.saved, layer, layers, heads * self.ranks)
        if name is None:
            return settings
        learned = None if self.learned is None else self.learned.get(name, {})
        return with_learned(settings, name, learned, self.rank, self.ranks)


def invariant(settings: Settings, switch: str | None, name: str) -> bool | None:
    """The switch of a layer for batch invariance; `switch` is the server's own where that is on."""
    if switch is None:
        return settings.batch_invariant
    if settings.batch_invariant is False:
        raise ValueError(f"batch_invariant: expected True or None under {switch}, got False at {name}")
    return True


@dataclass(frozen=True)
class LayerFactor:
    """The scaling and the gain of a layer, and what they take of a call besides the numbers of visible keys.

    reads_norms   the norms of keys
    shared        a key that layers with the same factor of the same numbers have, or None
    """

    scaling: Scaling
    gain: float | Tensor | None
    reads_norms: bool
    shared: str | None

    @classmethod
    def of(cls, settings: Settings, scale: float, heads: tuple[int, int], head_size: int) -> LayerFactor:
        """Take the factor of a layer that scales by `scale` without a patch, on a CPU; heads are Hq and Hkv."""
        given = scaling_arguments(settings, scale, head_size)
        q, k = (torch.full((1, n, 1, head_size), torch.nan, dtype=torch.float32, device="cpu") for n in heads)
        read, visibility = [], Visibility.of(q, k, causal=True)
        request = check(Request(q, k, k, visibility, Terms(), **given), "[1, Hq, 1]")
        query = logits(request, Statistics(lambda: read.append(True) or k, visibility)).query_scale
        reads_query = query is not None and bool(query.isnan().any())
        is_learned = any(isinstance(part, (nn.Module, Tensor)) for part in (request.scaling, request.gain))
        shared = None if read or reads_query or is_learned else repr((to_config(given["scaling"]), request.gain))
        return cls(request.scaling, request.gain, bool(read), shared)

    def to(self, device: torch.device) -> LayerFactor:
        if isinstance(self.scaling, nn.Module):
            self.scaling.to(device)
        return replace(self, gain=self.gain.to(device) if isinstance(self.gain, Tensor) else self.gain)
