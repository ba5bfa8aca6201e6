"""Masks as other libraries have them, bool or added to logits, as masks of visible keys and biases of pairs."""

from __future__ import annotations

import torch
from torch import Tensor

from .autograd import runs_eagerly

# An additive mask hides a key by a number at most this, whose exp is 0 in every dtype.
_HIDDEN = -1e4


def mask_arguments(name: str, mask: Tensor | None) -> dict[str, Tensor]:
    """The arguments mask and bias of `tritonattn.attention` for a mask, additive or bool with True for visible.

    An additive mask that takes no gradient is read on the host: one that only hides keys is no bias. While compiling,
    and under torch.func, every additive mask is one. Raises TypeError for integers.
    """
    if mask is None:
        return {}
    if mask.dtype == torch.bool:
        return {"mask": mask}
    if not mask.is_floating_point():
        raise TypeError(f"{name}: expected a bool or floating mask, got {mask.dtype}")
    hidden = mask <= _HIDDEN
    if not mask.requires_grad and runs_eagerly(mask) and bool((hidden | (mask == 0)).all()):
        return {"mask": ~hidden}
    return {"mask": ~hidden, "bias": mask}
