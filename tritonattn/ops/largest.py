"""The gradient of the largest logit of each row: that of one logit, whose key a pass over all pairs finds."""

from __future__ import annotations

import torch
from torch import Tensor

from ..backends.cpu.forward_pass import largest_keys
from ..core.autograd import without_autocast
from ..core.call import AttentionCall
from ..core.terms import Gradients, Needs


def with_gradients_of_largest(call: AttentionCall, found: Gradients, d_max: Tensor, needs: Needs) -> Gradients:
    """The gradients found, and what d_max [B, Hq, Sq], the gradient of max_logit, adds to them.

    The lowest key with the largest logit takes it. Sums over rows are in fp32 (fp64 for fp64 q), memory is O(Sq D).
    Raises NotImplementedError under batch_invariant.
    """
    if call.visibility.invariant:
        raise NotImplementedError("batch_invariant: not supported with gradients of max_logit; they exist without it")
    with torch.no_grad(), without_autocast(call.q):
        added = _of_one_key(call, largest_keys(call), d_max, needs)
    pairs = zip(found, added, strict=True)
    return Gradients(*(x if x is None or y is None else (x.to(y.dtype) + y).to(x.dtype) for x, y in pairs))


def _of_one_key(call: AttentionCall, keys: Tensor, d_max: Tensor, needs: Needs) -> Gradients:
    """Gradients of sum_i d_max[i] * logit[i, keys[i]], where keys, int64 [B, Hq, Sq], is -1 in rows without keys.

    Each tensor is gathered along keys, [B, Hq, Sq, ...], and its gradients are scattered back.
    """
    terms, visible, dtype = call.terms, call.visibility, torch.promote_types(call.q.dtype, torch.float32)
    blind = keys < 0
    keys, d_max = keys.clamp(min=0), d_max.to(dtype).masked_fill(blind, 0)
    batch, head, row = (
        torch.arange(size, device=keys.device).view(-1, *[1] * (2 - axis)) for axis, size in enumerate(keys.shape)
    )
    group = visible.q_heads // visible.kv_heads
    of_keys = batch, head // group, keys
    indices = {"k": of_keys, "key_scale": of_keys, "key_bias": (*of_keys[:2], head % group, keys)}
    indices["bias"] = batch, head, row, keys
    inside = torch.ones_like(blind)
    table = terms.relative_scale if terms.relative_bias is None else terms.relative_bias
    if table is not None:
        entry = (visible.positions() + terms.relative_right)[:, None] - keys
        inside = (entry >= 0) & (entry < table.shape[3])
        indices["relative_bias"] = indices["relative_scale"] = batch, head, row, entry.clamp(0, table.shape[3] - 1)

    def at(name: str, shape: torch.Size) -> tuple[Tensor, ...]:
        """The index of the rows' entries in a tensor, where an axis of 1 has one entry for all."""
        return tuple([torch.zeros_like(i) if size == 1 else i for i, size in zip(indices[name], shape, strict=False)])

    def seen(x: Tensor) -> Tensor:
        return x.to(dtype).masked_fill(blind if x.dim() == 3 else blind[..., None], 0)

    def scale(name: str) -> Tensor:
        x = getattr(terms, name)
        if x is None:
            return torch.ones_like(d_max)
        if name == "query_scale":
            return seen(x)
        of_rows = seen(x[at(name, x.shape)])
        return torch.where(inside, of_rows, 1) if name == "relative_scale" else of_rows

    query, key = seen(call.q), seen(call.k[of_keys])
    scales = {name: scale(name) for name in ("query_scale", "key_scale", "relative_scale")}
    product = (query * key).sum(-1) * terms.scale
    factor = scales["query_scale"] * scales["key_scale"] * scales["relative_scale"]
    d_product = d_max
    cap = terms.softcap_of_rows() if terms.bias_after_softcap else None
    if isinstance(cap, Tensor):
        cap = seen(cap)
        cap = cap.masked_fill(cap == 0, 1)
    if cap is not None:
        d_product = d_max * (1 - torch.tanh(factor * product / cap).square())

    def scattered(name: str, x: Tensor, d_x: Tensor) -> Tensor:
        return x.new_zeros(x.shape, dtype=dtype).index_put_(at(name, x.shape), d_x, accumulate=True)

    d_scaled = (d_product * factor * terms.scale)[..., None]
    gradients = {"q": d_scaled * key, "k": d_scaled * query}
    for name in scales:
        rest = [x for other, x in scales.items() if other != name]
        gradients[name] = d_product * product * rest[0] * rest[1]
    gradients |= dict.fromkeys(("key_bias", "bias"), d_max)
    gradients["relative_bias"] = torch.where(inside, d_max, 0)
    gradients["relative_scale"] = torch.where(inside, gradients["relative_scale"], 0)
    found = {}
    for name, x in zip(Gradients._fields, call.tensors(), strict=True):
        if getattr(needs, name) and name in gradients and x is not None:
            d_x = gradients[name]
            found[name] = d_x if name in ("q", "query_scale") else scattered(name, x, d_x)
    return Gradients(**found)
