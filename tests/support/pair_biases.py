"""Attention with biases of pairs by its formula, in the dtype of its tensors."""

from __future__ import annotations

import torch
from torch import Tensor

from tritonattn.core.call import ForwardResult

Tensors = dict[str, Tensor]
BIASES = ("key_bias", "bias", "relative_bias")


def by_formula(
    tensors: Tensors,
    visible: Tensor,
    position: Tensor,
    *,
    scale: float,
    softcap: float | None = None,
    relative_right: int = 0,
    bias_after_softcap: bool = False,
) -> ForwardResult:
    """The softmax of logits with biases, of q [B, Hq, Sq, D], k and v [B, Hkv, Sk, D or Dv].

    visible    bool, broadcastable to [B, Hq, Sq, Sk]
    position   int64 [B or 1, Sq], the key from which relative_bias counts
    tensors    besides q, k, v: fields of `Logits`, key_bias as [B, Hkv, group, Sk]
    """
    q, terms = tensors["q"], {name: x for name, x in tensors.items() if name not in "qkv"}
    group, k_len = q.shape[1] // tensors["k"].shape[1], tensors["k"].shape[2]
    k, v = (tensors[name].repeat_interleave(group, 1) for name in "kv")
    x = scale * (q @ k.mT)
    visible = visible.expand(x.shape)
    if "query_scale" in terms:
        x = x * terms["query_scale"][..., None]
    if "key_scale" in terms:
        x = x * terms["key_scale"].repeat_interleave(group, 1)[:, :, None]
    bias = _bias(terms, x, position[..., None] - torch.arange(k_len, device=q.device) + relative_right)
    bias = torch.where(visible, bias, 0)  # what hidden pairs hold counts for nothing
    if softcap is not None and bias_after_softcap:
        z = logit = softcap * torch.tanh(x / softcap) + bias
    else:
        z = logit = x + bias
        if softcap is not None:
            z = softcap * torch.tanh(logit / softcap)
    has_weight = visible & (bias != -torch.inf)
    z = z.masked_fill(~has_weight, -torch.inf)
    lse = torch.logsumexp(z.masked_fill(~has_weight.any(-1, keepdim=True), -torch.inf), -1)
    p = torch.where(has_weight, (z - torch.where(has_weight.any(-1), lse, 0)[..., None]).exp(), 0)
    entropy = torch.special.entr(p).sum(-1)
    if "sinks" in terms:
        share = torch.where(has_weight.any(-1), torch.sigmoid(lse - terms["sinks"][:, None]), 0)
        p = p * share[..., None]
    return ForwardResult(p @ v, lse, logit.masked_fill(~has_weight, -torch.inf).amax(-1), entropy)


def _bias(terms: Tensors, x: Tensor, entry: Tensor) -> Tensor:
    """The sum of the biases, [B, Hq, Sq, Sk]; entry [B or 1, Sq, Sk]: of relative_bias."""
    total = torch.zeros_like(x)
    if "key_bias" in terms:
        total = total + terms["key_bias"].flatten(1, 2)[:, :, None]
    if "bias" in terms:
        total = total + terms["bias"].to(x.dtype)
    if "relative_bias" in terms:
        table = terms["relative_bias"].to(x.dtype)
        entry, extent = entry[:, None].expand(x.shape), table.shape[3]
        inside = (entry >= 0) & (entry < extent)
        table = table.expand(*x.shape[:3], extent)
        total = total + torch.where(inside, table.gather(3, entry.clamp(0, extent - 1)), 0)
    return total
