"""Context parallel attention by all-to-all: ranks exchange their tokens of all heads for all tokens of some heads.

Source: Jacobs et al. 2023 (DeepSpeed-Ulysses), arXiv:2309.14509.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .. import ops
from ..core.call import AttentionCall, ForwardResult
from .collectives import Wire, heads_to_tokens, tokens_to_heads
from .sequence import SharedCall


def attention(call: AttentionCall, shared: SharedCall) -> ForwardResult:
    """Attend to the whole sequence with this rank's heads; key heads are repeated until the ranks divide them."""
    split, logits = shared.sequence.split, call.terms
    dtype, wide = call.v.dtype, torch.promote_types(call.q.dtype, torch.float32)
    gradients = torch.promote_types(shared.reduce_dtype, dtype)
    repeats = split.size // math.gcd(split.size, call.k.shape[1])

    def repeated(x: Tensor) -> Tensor:
        return x.repeat_interleave(repeats, dim=1) if repeats > 1 else x

    def of_rank(x: Tensor, dim: int) -> Tensor:
        count = x.shape[dim] // split.size
        return x.narrow(dim, split.rank * count, count)

    q = heads_to_tokens(call.q, split, Wire(dtype, dtype))
    k, v = (heads_to_tokens(repeated(x), split, Wire(dtype, gradients)) for x in (call.k, call.v))
    query, sinks = (
        None if x is None else heads_to_tokens(x[..., None], split, Wire(wide, wide))[..., 0]
        for x in (logits.query_scale, logits.sinks)
    )
    key = None if logits.key_scale is None else of_rank(repeated(logits.key_scale), 1)
    bias = logits.key_bias
    if bias is not None:  # [B, Hkv, Hq / Hkv, S]: a repeated key head takes its share of the query heads
        bias = of_rank(bias.unflatten(2, (repeats, -1)).flatten(1, 2), 1)
    local = logits.changed(query_scale=query, key_scale=key, key_bias=bias, sinks=sinks)
    visible, options = shared.sequence.of_all_rows(q, k), {"aux": shared.aux, "backend": shared.backend}
    result = ops.attention(AttentionCall(q, k, v, visible, local, **options))
    out, lse = tokens_to_heads(result.out, split, Wire(dtype, dtype)), result.lse
    if not shared.aux:
        return ForwardResult(out, lse)
    rows = torch.stack([x for x in result[1:] if x is not None], -1)  # lse, max_logit, entropy
    return ForwardResult(out, *tokens_to_heads(rows, split, Wire(wide, wide)).unbind(-1))
