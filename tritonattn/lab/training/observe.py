"""Observations of a training run beside its loss: gradient norms and entropies."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import Tensor, nn

from ...analysis.row_statistics import relative_entropy
from ...calls.attention import attention
from ...core.visibility import Visibility
from ...nn import ScaledAttention

# Weights before the softmax's input, and those whose gradient bypasses it.
_PARTS = {"qk": ("q_proj", "k_proj"), "vo": ("v_proj", "o_proj")}


def attentions(model: nn.Module) -> dict[str, ScaledAttention]:
    """Find the attention layers by name, in the model's order."""
    return {name: module for name, module in model.named_modules() if isinstance(module, ScaledAttention)}


def gradient_norms(model: nn.Module) -> dict[str, float]:
    """Compute gradient norms by layer and part, such as "blocks.0.attention qk".

    "qk" are the weights that make q and k, "vo" those of v and the output.
    """
    found = {}
    for name, layer in attentions(model).items():
        for part, projections in _PARTS.items():
            gradients = [layer.get_submodule(one).weight.grad for one in projections]
            squares = [g.double().square().sum() for g in gradients if isinstance(g, Tensor)]
            found[f"{name} {part}"] = float(torch.stack(squares).sum().sqrt()) if squares else 0.0
    return found


@contextmanager
def entropies(model: nn.Module) -> Iterator[dict[str, float]]:
    """Observe forward passes inside the context: they fill the returned dict.

    By layer, the mean of entropy / ln n over the rows that see n > 1 keys: 1 is uniform attention, 0 a single key.
    """
    found: dict[str, float] = {}

    def watch(name: str):
        def hook(layer: Any, arguments: tuple, keywords: dict[str, Any]) -> None:
            x, *rest = arguments
            found[name] = _entropy(layer, x, rest[0] if rest else None, keywords.get("key_lengths"))

        return hook

    hooks = [
        layer.register_forward_pre_hook(watch(name), with_kwargs=True) for name, layer in attentions(model).items()
    ]
    try:
        yield found
    finally:
        for hook in hooks:
            hook.remove()


@torch.no_grad()
def _entropy(layer: ScaledAttention, x: Tensor, context: Tensor | None, key_lengths: Tensor | None) -> float:
    q, k, v = layer.operands(x, context)
    seen = {"causal": layer.causal, "window": layer.window, "key_lengths": key_lengths}
    _, aux = cast(Any, attention(q, k, v, scaling=layer.scaling, return_aux=True, **seen))
    counts = Visibility.of(q, k, **seen).counts().expand_as(aux.entropy)  # [B, Hq, Sq]
    return float(relative_entropy(aux.entropy, counts)[counts > 1].mean())
