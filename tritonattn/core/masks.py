"""Masks as other libraries have them, bool or added to logits, as masks of visible keys."""

from __future__ import annotations

import torch
from torch import Tensor

# An additive mask hides a key by a number at most this, whose exp is 0 in every dtype.
_HIDDEN = -1e4
_BIAS = "{}: expected a mask, bool or floats that are 0 or at most -1e4; other numbers are a bias on the logits"


def visible_keys(name: str, mask: Tensor) -> Tensor:
    """Turn a mask, additive or bool with True for visible, into bool with True for visible.

    Raises NotImplementedError for an additive mask that is a bias. Its values are read on the host; while compiling, a
    bias fails an assertion instead.
    """
    if mask.dtype == torch.bool:
        return mask
    if not mask.is_floating_point():
        raise TypeError(f"{name}: expected a bool or floating mask, got {mask.dtype}")
    visible = mask == 0
    is_mask = (visible | (mask <= _HIDDEN)).all()
    if torch.compiler.is_compiling():
        torch._assert_async(is_mask, _BIAS.format(name))  # pyright: ignore[reportPrivateImportUsage]
    elif not is_mask:
        raise NotImplementedError(_BIAS.format(name))
    return visible
