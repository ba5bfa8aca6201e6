"""The loss of every token of a long text, without logits for all of them at once."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ...core.errors import CommandError
from ...huggingface import patch
from ..demo.measurement import Subject
from ..demo.variants import Variant

_ROWS = 256  # logits that exist at a time
# Settings that change a model's logits after the head.
_AFTER_THE_HEAD = ("final_logit_softcapping", "logits_scaling", "logit_scale")


def check_head(subject: Subject) -> None:
    """Raise CommandError for a model without a head, or with logits that differ from its head's output."""
    for name in _AFTER_THE_HEAD:
        if getattr(subject.model.config, name, None) not in (None, 1.0):
            raise CommandError(f"--model: expected one whose head gives its logits, got {subject.name!r} with {name}")
    if subject.model.get_output_embeddings() is None:
        raise CommandError(f"--model: expected a language model with a head, got {type(subject.model).__name__}")


def losses(subject: Subject, tokens: Tensor, variant: Variant) -> Tensor:
    """Compute the cross entropy in nats of tokens 1 to S - 1 of tokens [1, S], given all before: fp32 [S - 1].

    Logits exist for a few hundred positions at a time, never [S, vocabulary].
    """
    try:
        patched = patch(subject.model, scaling=variant.scaling, gain=variant.gain)
    except (NotImplementedError, ValueError) as error:
        raise CommandError(str(error)) from error
    with patched, torch.inference_mode():
        model: Any = subject.model
        states = model.base_model(input_ids=tokens, use_cache=False).last_hidden_state[0, :-1]  # [S - 1, width]
        head = model.get_output_embeddings()
        rows = zip(states.split(_ROWS), tokens[0, 1:].split(_ROWS), strict=True)
        return torch.cat([F.cross_entropy(head(x).float(), y, reduction="none") for x, y in rows]).cpu()
