"""Translation of other libraries' arguments into those of `tritonattn.attention`."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..nn.registry import scaling_of_layer
from ..scaling import Scaling

# An additive mask hides a key by a number at most this, whose exp is 0 in every dtype.
_HIDDEN = -1e4
_BIAS = (
    "{}: expected a mask, bool or floats that are 0 or at most -1e4; other numbers are a bias on the logits, which"
    " tritonattn does not add"
)


def scaling_for(scaling: str | Scaling, heads: int, device: torch.device | None = None) -> Scaling:
    """The Scaling of a layer that may be trained: by a learned name a new module at sqrt_dim, a `Scaling` as it is."""
    own = scaling_of_layer(scaling, heads, trained=True)
    return own.to(device) if isinstance(own, nn.Module) else own


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


def keys_and_masks(
    q: Tensor, k: Tensor, v: Tensor, attn_mask: Tensor | None, is_causal: bool
) -> tuple[Tensor, Tensor, dict[str, Any]]:
    """k, v and the masks of `tritonattn.attention` for those of F.scaled_dot_product_attention: causal is j <= i."""
    if not is_causal:
        return k, v, {} if attn_mask is None else {"mask": visible_keys("attn_mask", attn_mask)}
    if attn_mask is not None:
        raise ValueError("attn_mask: expected None with is_causal=True, got a tensor")
    q_len, k_len = q.shape[2], k.shape[2]
    if q_len > k_len:
        return k, v, {"window": (None, q_len - k_len)}
    return k[:, :, :q_len], v[:, :, :q_len], {"causal": True}
