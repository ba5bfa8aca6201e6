"""Run a model with one scaling, and observe every attention layer."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...analysis.row_statistics import relative_entropy
from ...calls.results import AttentionAux
from ...core.errors import CommandError
from ...huggingface import Patched, patch
from ...huggingface.architecture import attention_modules, head_dim, query_heads
from ...huggingface.masks import visibility_of
from ..modes import PatchMode

_ROWS = 256  # logits that the loss upcasts at a time


@dataclass(eq=False)
class Subject:
    """A model under study, with its tokenizer."""

    name: str
    model: Any
    tokenizer: Any
    device: torch.device

    @property
    def context(self) -> int | None:
        """The longest sequence in the model's training, if its configuration states one."""
        return getattr(self.model.config, "max_position_embeddings", None)

    def tokens(self, text: str) -> Tensor:
        """Read a text as tokens, int64 [1, S]."""
        return self.tokenizer(text, return_tensors="pt", verbose=False)["input_ids"].to(self.device)


@dataclass(frozen=True)
class Layer:
    """One attention layer, over its heads and the rows of more than one visible key; fields as in the JSON.

    A head's entropy is a mean over rows: the lowest is that of the sharpest head.
    """

    name: str
    entropy_over_ln_n: float
    largest_logit: float
    lowest_entropy_of_a_head: float = 0.0
    highest_entropy_of_a_head: float = 1.0
    mean_largest_logit_of_a_row: float = 0.0


@dataclass(frozen=True)
class Measurement:
    """The loss of a mode in nats per token, and its layers in the order in which they ran."""

    mode: str
    loss: float
    layers: tuple[Layer, ...]
    seconds: float

    @property
    def entropy(self) -> float:
        """Mean over the layers of entropy / ln(n), n a row's visible keys: 1 is uniform, 0 a single key."""
        return sum(layer.entropy_over_ln_n for layer in self.layers) / len(self.layers)

    @property
    def largest_logit(self) -> float:
        return max(layer.largest_logit for layer in self.layers)


def measure(subject: Subject, tokens: Tensor, variant: PatchMode, layers: Any = None) -> Measurement:
    """Run tokens [1, S] through the model, with the layers that `patch` finds by `layers` scaled by a variant."""
    found: list[Layer] = []
    names = {id(module): name for name, module in subject.model.named_modules()}

    def observe(module: nn.Module, query: Tensor, key: Tensor, arguments: dict[str, Any], aux: AttentionAux) -> None:
        found.append(_layer(names[id(module)], query, key, arguments, aux))

    start = time.perf_counter()
    with patched_with(subject, variant, layers) as patched, patched.watch(observe):
        loss = _loss(subject, tokens)
    return Measurement(variant.name, loss, tuple(found), time.perf_counter() - start)


def patched_with(subject: Subject, variant: PatchMode, layers: Any = None) -> Patched:
    """Patch a model, with a scaling for the heads of its first layer. Raises CommandError where `patch` refuses."""
    found = [layer.module for layer in attention_modules(subject.model) if layer.obstacle is None]
    scaling = variant.scaling(query_heads(found[0]), head_dim(found[0]) or 1) if found else variant.mode
    if isinstance(scaling, nn.Module):
        scaling = scaling.to(subject.device)
    try:
        return patch(subject.model, scaling=scaling, gain=variant.gain, layers=layers)
    except (NotImplementedError, ValueError) as error:
        raise CommandError(str(error)) from error


def eager_loss(subject: Subject, tokens: Tensor) -> float:
    """Compute the loss with the model's eager attention, in nats per token."""
    before = subject.model.config._attn_implementation
    subject.model.set_attn_implementation("eager")
    try:
        return _loss(subject, tokens)
    finally:
        subject.model.set_attn_implementation(before)


def _loss(subject: Subject, tokens: Tensor) -> float:
    """Mean cross entropy of every token after the first, in nats."""
    with torch.inference_mode():
        logits = subject.model(input_ids=tokens, use_cache=False).logits[0, :-1]  # [S - 1, V]
        rows = zip(logits.split(_ROWS), tokens[0, 1:].split(_ROWS), strict=True)
        total = sum(F.cross_entropy(row.float(), target, reduction="sum").double() for row, target in rows)
    return float(total) / logits.shape[0]


def _layer(name: str, query: Tensor, key: Tensor, arguments: dict[str, Any], aux: AttentionAux) -> Layer:
    count = visibility_of(query, key, arguments).counts().expand_as(aux.entropy)  # [B, Hq, Sq]
    several = count > 1
    relative = relative_entropy(aux.entropy, count)
    heads = torch.where(several, relative, 0).sum((0, 2)) / several.sum((0, 2))  # [Hq]
    return Layer(
        name,
        float(relative[several].mean()),
        float(aux.max_logit[several].max()),
        float(heads.min()),
        float(heads.max()),
        float(aux.max_logit[several].double().mean()),
    )
