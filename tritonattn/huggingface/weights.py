"""Attention weights for output_attentions=True, from the reference: no fast path forms them."""

from __future__ import annotations

import inspect
import warnings
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import utils

from ..calls.attention import attention
from .settings import layer_scaling

_COSTLY = (
    "output_attentions=True: no kernel of tritonattn forms attention weights, so the eager reference does, in O(Q K)"
    " memory a layer"
)


def note_wanted_weights(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Forward pre-hook of a patched module that does not pass output_attentions on: keep its value."""
    arguments = inspect.signature(module.forward).bind_partial(*args, **kwargs).arguments
    own = layer_scaling(module)
    own.weights_wanted = bool(arguments.get("output_attentions"))


def wants_weights(module: nn.Module, kwargs: dict[str, Any]) -> bool:
    """True where the model is asked for attention weights: by argument, by config, or by a recording hook."""
    own = layer_scaling(module)
    if kwargs.get("output_attentions") or getattr(own, "weights_wanted", False):
        return True
    for config in (getattr(module, "config", None), getattr(own, "shared", None)):
        if getattr(config, "output_attentions", False):
            return True
    # transformers may drop the argument and record the modules' results instead: up to 4.57 by replacing their
    # forward, later by hooks that write into a collector.
    forward = module.__dict__.get("forward")
    if getattr(getattr(forward, "__code__", None), "co_name", None) == "wrapped_forward":
        return True
    recorder = getattr(getattr(utils, "output_capturing", None), "_active_collector", None)
    if recorder is None or torch.compiler.is_compiling():
        return False
    return any("attentions" in name for name in recorder.get() or ())


def attention_weights(module: nn.Module, query: Tensor, key: Tensor, arguments: dict[str, Any]) -> Tensor:
    """Weights [B, Hq, Q, K] in query's dtype, before dropout: the reference's result for unit vectors as values."""
    if not torch.compiler.is_compiling():
        warnings.warn(f"{type(module).__name__}: {_COSTLY}", stacklevel=3)
    keys = key.shape[2]
    unit = torch.eye(keys, dtype=key.dtype, device=key.device).expand(*key.shape[:2], keys, keys)
    others = {"dropout_p": 0.0, "backend": "reference", "batch_invariant": False}
    return cast(Tensor, attention(query, key, unit, **{**arguments, **others}))
