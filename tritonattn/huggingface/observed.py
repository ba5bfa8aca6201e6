"""Seeing the attention of layers that were not patched: they compute as ever, and say what from."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import AttentionInterface

from ..calls.attention import attention
from ..calls.dispatch import AttentionAux
from ..core.observation import ObservedCall, is_observed, notify_observers
from ..core.visibility import Visibility
from .architecture import AttentionModule, attention_modules, interface_function
from .attention import NAME, call_arguments
from .own_configs import IMPLEMENTATION
from .patching import install
from .settings import ATTRIBUTE, LayerScaling, Settings, layer_scaling, remove, remove_abandoned

_OBSERVED = "tritonattn_observed"
_VISIBLE = ("causal", "window", "key_ranges", "mask")
_READABLE = ("eager", "sdpa")
_EAGER = "eager_attention_forward"


def own_attention(model: nn.Module) -> list[AttentionModule]:
    """The attention modules of a transformers model that use its own attention: not patched, and not "tritonattn".

    Raises ValueError where one uses an implementation whose masks cannot be read.
    """
    found, modules = [], attention_modules(model)
    remove_abandoned(one.module for one in modules)
    for one in modules:
        patched = layer_scaling(one.module) is not None
        if one.obstacle is not None or patched or _implementation(one) == NAME:
            continue
        if _implementation(one) not in _READABLE:
            raise ValueError(
                f"model: expected attention that is patched, or one of {', '.join(_READABLE)}, got"
                f" {_implementation(one)!r} in {one.name}: call model.set_attn_implementation('sdpa'), or patch(model)"
            )
        found.append(one)
    return found


@contextmanager
def tell_of(layers: list[AttentionModule]) -> Iterator[None]:
    """While the context lasts, layers of `own_attention` tell `observing` of their calls.

    Each computes what it computed before, to the bit; only the name of its implementation differs.
    """
    installed: list[tuple[Any, LayerScaling]] = []
    try:
        for one in layers:
            own = LayerScaling(Settings(), temporary=True)
            installed.append((one.module, own))
            install(one.module, own, _OBSERVED)
        yield
    finally:
        for module, own in installed:
            own.watched = False
            if layer_scaling(module) is own:
                remove(module)


def register_observed() -> None:
    """Make the implementation of watched layers known to transformers; copies of a watched model name it, too."""
    AttentionInterface.register(_OBSERVED, _observed_forward)


def _implementation(one: AttentionModule) -> str:
    return getattr(one.module.config, IMPLEMENTATION, None) or "eager"


def _observed_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | Tensor | None = None,
    dropout: float = 0.0,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """The module's own attention function, and what it was called with."""
    own = _own_function(module)
    rest = dict(kwargs) if scaling is None else {**kwargs, "scaling": scaling}
    out, weights = own(module, query, key, value, attention_mask, dropout=dropout, **rest)
    if is_observed():
        with torch.no_grad():
            arguments = call_arguments(module, query, key, attention_mask, scaling, **kwargs)
        seen = Visibility.of(query, key, **{name: arguments[name] for name in arguments.keys() & set(_VISIBLE)})

        def aux() -> AttentionAux:
            with torch.no_grad():
                narrow = key.detach()[..., :1]
                return cast(tuple[Tensor, AttentionAux], attention(query, key, narrow, **arguments, return_aux=True))[1]

        notify_observers(ObservedCall(query, key, out.transpose(1, 2), seen, arguments["softcap"], aux))
    return out, weights


def _own_function(module: Any) -> Any:
    """What the module would have called."""
    shared = getattr(module, ATTRIBUTE).shared
    name = getattr(shared, IMPLEMENTATION, None) or "eager"
    if name != "eager":
        return AttentionInterface()[name]
    function = interface_function(type(module))  # it names what its file calls eager attention
    return next(function.__globals__[own] for own in function.__code__.co_names if own.endswith(_EAGER))
