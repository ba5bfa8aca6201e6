"""Translation of other libraries' arguments into those of `tritonattn.attention`."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..core.pair_biases import mask_arguments
from ..nn.registry import scaling_of_layer
from ..scaling import Scaling
from ..scaling.names import LayerMode


def scaling_for(scaling: LayerMode | Scaling, heads: int, device: torch.device | None = None) -> Scaling:
    """`scaling_of_layer` on a device."""
    made = scaling_of_layer(scaling, heads)
    return made.to(device) if isinstance(made, nn.Module) else made


def keys_and_masks(
    q: Tensor, k: Tensor, v: Tensor, attn_mask: Tensor | None, is_causal: bool
) -> tuple[Tensor, Tensor, dict[str, Any]]:
    """k, v, and masks and bias of `attention`, for those of F.scaled_dot_product_attention: causal is j <= i."""
    if not is_causal:
        return k, v, mask_arguments("attn_mask", attn_mask)
    if attn_mask is not None:
        raise ValueError("attn_mask: expected None with is_causal=True, got a tensor")
    q_len, k_len = q.shape[2], k.shape[2]
    if q_len > k_len:
        return k, v, {"window": (None, q_len - k_len)}
    return k[:, :, :q_len], v[:, :, :q_len], {"causal": True}
