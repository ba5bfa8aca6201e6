"""Attention weights for output_attentions=True, which no fast path forms: from the reference."""

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
    "output_attentions=True: tritonattn's kernels form no attention weights; they come from the eager reference, in"
    " O(Q K) memory for every layer"
)


def note_wanted_weights(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """A forward pre-hook of a patched module whose argument output_attentions does not reach the attention function."""
    arguments = inspect.signature(module.forward).bind_partial(*args, **kwargs).arguments
    own = layer_scaling(module)
    own.weights_wanted = bool(arguments.get("output_attentions"))


def wants_weights(module: nn.Module, kwargs: dict[str, Any]) -> bool:
    """Whether the caller of the model asked for attention weights: by argument, by config, or by a recording hook."""
    own = layer_scaling(module)
    if kwargs.get("output_attentions") or getattr(own, "weights_wanted", False):
        return True
    for config in (getattr(module, "config", None), getattr(own, "shared", None)):
        if getattr(config, "output_attentions", False):
            return True
    # transformers records what attention modules return, and may drop the argument on the way to them: up to 4.57 it
    # replaces their forward while it does, later it lets hooks write into what is collected.
    forward = module.__dict__.get("forward")
    if getattr(getattr(forward, "__code__", None), "co_name", None) == "wrapped_forward":
        return True
    recorder = getattr(getattr(utils, "output_capturing", None), "_active_collector", None)
    if recorder is None or torch.compiler.is_compiling():
        return False
    return any("attentions" in name for name in recorder.get() or ())


def attention_weights(module: nn.Module, query: Tensor, key: Tensor, arguments: dict[str, Any]) -> Tensor:
    """[B, Hq, Q, K] in query's dtype, before dropout: what the reference gives for values that are unit vectors."""
    if not torch.compiler.is_compiling():
        warnings.warn(f"{type(module).__name__}: {_COSTLY}", stacklevel=3)
    keys = key.shape[2]
    unit = torch.eye(keys, dtype=key.dtype, device=key.device).expand(*key.shape[:2], keys, keys)
    return cast(Tensor, attention(query, key, unit, **{**arguments, "dropout_p": 0.0, "backend": "reference"}))
