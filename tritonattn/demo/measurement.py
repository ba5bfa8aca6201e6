"""Run a model with one scaling, and watch every attention layer."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..api import attention
from ..command import CommandError
from ..dispatch import AttentionAux
from ..huggingface import call_arguments, key_range_mask, register, unregister
from ..visibility import Visibility

NAME = "tritonattn_watched"
_ROWS = 256  # logits that the loss upcasts at a time


@dataclass(eq=False)
class Subject:
    """The model under study; own_scaling_is_sqrt_dim says that every layer seen so far asks for 1/sqrt(D)."""

    name: str
    model: Any
    tokenizer: Any
    device: torch.device
    own_scaling_is_sqrt_dim: bool = True


@dataclass(frozen=True)
class Layer:
    """Mean entropy / ln(n) and largest logit, over the heads and the rows that see more than one key."""

    entropy: float
    largest_logit: float


@dataclass(frozen=True)
class Measurement:
    """loss in nats per token; layers in the order in which they ran."""

    mode: str
    loss: float
    layers: tuple[Layer, ...]
    seconds: float

    @property
    def entropy(self) -> float:
        """Mean over the layers of entropy / ln(n), n a row's visible keys: 1 is uniform, 0 a single key."""
        return sum(layer.entropy for layer in self.layers) / len(self.layers)

    @property
    def largest_logit(self) -> float:
        return max(layer.largest_logit for layer in self.layers)


def measure(subject: Subject, tokens: Tensor, mode: str) -> Measurement:
    """One pass over tokens [1, S] with the attention logits scaled by mode."""
    layers: list[Layer] = []

    def watched(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any):
        own, scaling = query.shape[-1] ** -0.5, kwargs.get("scaling")
        if scaling is not None and abs(scaling - own) > 1e-6 * own:
            subject.own_scaling_is_sqrt_dim = False
        arguments = call_arguments(module, query, key, *args, **kwargs)
        out, aux = cast(
            tuple[Tensor, AttentionAux], attention(query, key, value, **arguments, return_aux=True)
        )
        layers.append(_layer(query, key, arguments, aux))
        return out.transpose(1, 2).contiguous(), None

    config = subject.model.config
    config.tritonattn = {"scaling": mode}
    start = time.perf_counter()
    register(NAME, watched, _every_range)
    try:
        with _implementation(subject, NAME):
            loss = _loss(subject, tokens)
    finally:
        unregister(NAME)
        del config.tritonattn
    if not layers:
        raise CommandError(
            f"--model: {type(subject.model).__name__} takes no attention from AttentionInterface"
        )
    return Measurement(mode, loss, tuple(layers), time.perf_counter() - start)


def eager_loss(subject: Subject, tokens: Tensor) -> float:
    """The loss with the model's own eager attention, in nats per token."""
    with _implementation(subject, "eager"):
        return _loss(subject, tokens)


def _every_range(**arguments: Any) -> Tensor | None:
    """The mask function, with plain causal masks as ranges too."""
    return key_range_mask(**{**arguments, "allow_is_causal_skip": False})


@contextmanager
def _implementation(subject: Subject, name: str) -> Iterator[None]:
    before = subject.model.config._attn_implementation
    subject.model.set_attn_implementation(name)
    try:
        yield
    finally:
        subject.model.set_attn_implementation(before)


def _loss(subject: Subject, tokens: Tensor) -> float:
    """Mean cross entropy of every token after the first, in nats."""
    with torch.inference_mode():
        logits = subject.model(input_ids=tokens, use_cache=False).logits[0, :-1]  # [S - 1, V]
        rows = zip(logits.split(_ROWS), tokens[0, 1:].split(_ROWS), strict=True)
        total = sum(F.cross_entropy(row.float(), target, reduction="sum").double() for row, target in rows)
    return float(total) / logits.shape[0]


def _layer(query: Tensor, key: Tensor, arguments: dict[str, Any], aux: AttentionAux) -> Layer:
    names = ("causal", "window", "key_ranges", "mask")
    seen = Visibility.of(query, key, **{name: arguments[name] for name in names if name in arguments})
    count = seen.counts().expand_as(aux.entropy)  # [B, Hq, Sq]
    several = count > 1
    relative = aux.entropy[several].double() / count[several].log()
    return Layer(float(relative.mean()), float(aux.max_logit[several].max()))
