"""Translation of other libraries' arguments into those of `tritonattn.attention`."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..calls.attention import attention
from ..calls.checks import Backend
from ..core.pair_biases import mask_arguments
from ..nn.registry import scaling_of_layer
from ..scaling import Scaling
from ..scaling.base import relative_gain
from ..scaling.names import LayerMode

LayerScaling = LayerMode | Scaling  # the scaling that `replace_sdpa` takes


def scaling_for(
    scaling: LayerScaling, heads: int, device: torch.device | None = None, tied: Collection[str] = ()
) -> Scaling:
    """`scaling_of_layer` on a device."""
    made = scaling_of_layer(scaling, heads, tied)
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


def attend(
    scaling: Scaling,
    backend: Backend,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    *,
    scale: float | None = None,
    enable_gqa: bool = False,
    options: Mapping[str, Any] | None = None,
) -> Any:
    """`attention` with a scaling, for the arguments of F.scaled_dot_product_attention: [..., H, S, D] each.

    Axes before the heads are one batch, and so is that of [B, S, D], whose one head it is without enable_gqa. Options
    are `attention`'s; with return_aux q has four axes. Raises NotImplementedError for nested tensors.
    """
    if query.is_nested or key.is_nested or value.is_nested:
        raise NotImplementedError("query, key, value: nested tensors are not supported; pad them, with a mask")
    if not enable_gqa and not query.shape[:-2] == key.shape[:-2] == value.shape[:-2]:
        heads = query.shape[-3]
        if key.shape[-3] != heads and 1 not in (heads, key.shape[-3]):
            raise ValueError(f"key: expected query's {heads} heads without enable_gqa, got {key.shape[-3]}")
        leading = torch.broadcast_shapes(query.shape[:-2], key.shape[:-2], value.shape[:-2])
        query, key, value = (x.expand(*leading, *x.shape[-2:]) for x in (query, key, value))
    leading = query.shape[:-2]
    if query.dim() == 3 and not enable_gqa:
        query, key, value = (x.unsqueeze(1) for x in (query, key, value))
        attn_mask = attn_mask if attn_mask is None or attn_mask.dim() < 3 else attn_mask.unsqueeze(1)
    if query.dim() != 4:
        if attn_mask is not None and attn_mask.dim() > 3:
            attn_mask = attn_mask.expand(*query.shape[:-3], *attn_mask.shape[-3:]).flatten(0, -4)
        query, key, value = (x.reshape(-1, *(1, *x.shape)[-3:]) for x in (query, key, value))
    if attn_mask is not None and attn_mask.dim() == 3:
        attn_mask = attn_mask[None]  # of heads, by torch's broadcasting
    k, v, masks = keys_and_masks(query, key, value, attn_mask, is_causal)
    gain = relative_gain(scaling, scale, query.shape[-1])
    scaled = {"scaling": scaling, "gain": gain, "dropout_p": dropout_p, "backend": backend}
    out: Any = attention(query, k, v, **scaled, **(options or {}), **masks)
    return out if options and options.get("return_aux") else out.reshape(*leading, *out.shape[-2:])
