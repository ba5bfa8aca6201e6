"""Translation of other libraries' arguments into those of `tritonattn.attention`."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from ..nn.learned import as_mode
from ..nn.registry import named_at_sqrt_dim
from ..scaling import Scaling

# An additive mask hides a key by a number at most this, whose exp is 0 in every dtype.
_HIDDEN = -1e4
_BIAS = (
    "{}: expected a mask, bool or floats that are 0 or at most -1e4; other numbers are a bias on the logits, which"
    " tritonattn does not add"
)


def scaling_for(scaling: str | Scaling, heads: int) -> Scaling:
    """The Scaling of a layer that may be trained: by a learned name a new module at sqrt_dim, a `Scaling` as it is."""
    return named_at_sqrt_dim(scaling, heads) if isinstance(scaling, str) else as_mode(scaling)


def gain_for(scaling: Scaling, scale: float | None, head_dim: int) -> float | None:
    """The gain that keeps a library's own scale beside the mode; None if it is 1 / sqrt(D), or the mode a cosine."""
    if scale is None or scaling.name in ("cosine", "learned_cosine"):
        return None
    gain = scale * math.sqrt(head_dim)
    return None if math.isclose(gain, 1.0, rel_tol=1e-6) else gain


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


def top_left_causal(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, dict[str, Any]]:
    """k, v and the arguments that let row i see the keys j <= i, as PyTorch's is_causal does."""
    q_len, k_len = q.shape[2], k.shape[2]
    if q_len > k_len:
        return k, v, {"window": (None, q_len - k_len)}
    return k[:, :, :q_len], v[:, :, :q_len], {"causal": True}
