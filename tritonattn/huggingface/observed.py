"""Observing the attention of layers that are not patched, without changing a bit of it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface

from ..calls.checks import check, operands
from ..calls.dispatch import observed_rows
from ..core.call import Request
from ..core.observation import ObservedCall, is_observed, notify_observers
from ..core.terms import Terms
from .architecture import AttentionModule, attention_modules, interface_function
from .attention import NAME, call_arguments
from .configs import IMPLEMENTATION, install
from .masks import visibility_of
from .settings import ATTRIBUTE, LayerScaling, Settings, layer_scaling, remove, remove_abandoned

_OBSERVED = "tritonattn_observed"
_READABLE = ("eager", "sdpa")
_EAGER = "eager_attention_forward"


def unpatched_attention(model: nn.Module) -> list[AttentionModule]:
    """The attention modules of a model that are not patched and do not use the implementation "tritonattn".

    Raises ValueError if one has an implementation whose masks cannot be read.
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
def observable(layers: list[AttentionModule]) -> Iterator[None]:
    """While the context lasts, layers of `unpatched_attention` notify observers of their calls.

    Their results do not change; only the name of their implementation does.
    """
    installed = [(one.module, LayerScaling(Settings(), temporary=True)) for one in layers]
    try:
        for module, layer in installed:
            install(module, layer, _OBSERVED)
        yield
    finally:
        for module, layer in installed:
            layer.watched = False
            if layer_scaling(module) is layer:
                remove(module)


def register_observed() -> None:
    """Register the implementation of observable layers, which copies of a watched model name for good."""
    AttentionInterface.register(_OBSERVED, _observed_forward)


def _implementation(one: AttentionModule) -> str:
    return getattr(one.module.config, IMPLEMENTATION, None) or "eager"


def _observed_forward(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | Tensor | None = None,
    dropout: float = 0.0,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """Call the module's attention function, and notify observers."""
    name = getattr(getattr(module, ATTRIBUTE).shared, IMPLEMENTATION, None) or "eager"
    if name == "eager":
        caller = interface_function(type(module))  # it names its file's eager attention
        function = next(caller.__globals__[one] for one in caller.__code__.co_names if one.endswith(_EAGER))
    else:
        function = AttentionInterface()[name]
    rest = dict(kwargs) if scaling is None else {**kwargs, "scaling": scaling}
    out, weights = function(module, query, key, value, attention_mask, dropout=dropout, **rest)
    if is_observed():
        with torch.no_grad():
            arguments = call_arguments(module, query, key, attention_mask, scaling, **kwargs)
            cast = operands(query, key, key)  # under autocast
        visible = visibility_of(query, key, arguments)
        terms = Terms(softcap=arguments["softcap"], bias=arguments.get("bias"))
        options = {name: arguments[name] for name in ("scaling", "gain", "backend")}
        request = check(Request(*cast, visible, terms, **options))
        notify_observers(ObservedCall(query, key, out.transpose(1, 2), request, lambda: observed_rows(request)))
    return out, weights
