"""The specification: attention in eager torch, O(Sq Sk), in any dtype up to fp64; written to be read."""

from __future__ import annotations

import functools
import operator

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid, pad

from ..core.autograd import without_autocast
from ..core.call import ForwardResult
from ..core.dropout import Dropout
from ..core.pair_biases import relative_pairs
from ..core.terms import Terms, per_group
from ..core.visibility import Visibility
from .protocol import Backend

PLAIN = Terms()


class Reference(Backend):
    """`attention` of this file, by the dense formulas of a scaling, which torch differentiates."""

    name, by_formulas = "reference", True

    def follows_lengths(self, device: torch.device) -> str | None:
        return "backend 'reference', whose products follow the lengths"


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    multiplier: Tensor | float,
    visibility: Visibility,
    addend: Tensor | None = None,
    terms: Terms = PLAIN,
    dropout: Dropout | None = None,
) -> ForwardResult:
    """Attention over the visible keys.

        logit[i, j]   = (q[i] . k[j]) * multiplier[i, j] + bias[i, j]
        capped[i, j]  = softcap * tanh(logit[i, j] / softcap)         or logit[i, j] without softcap
        lse[i]        = ln sum_j exp(capped[i, j])                    over the keys j visible to row i
        s[i, j]       = exp(capped[i, j] - lse[i])
        p[i, j]       = s[i, j] / (1 + exp(sinks[i] - lse[i]))        or s[i, j] without sinks
        out[i]        = sum_j keep[i, j] / (1 - p_drop) * p[i, j] * v[j]
        max_logit[i]  = max_j logit[i, j]
        entropy[i]    = -sum_j s[i, j] * ln(s[i, j])

    q, k, v      [B, Hq, Sq, D], [B, Hkv, Sk, D], [B, Hkv, Sk, Dv]; Hkv divides Hq
    multiplier   a float or a tensor broadcastable to [B, Hq, Sq, Sk]; of no account at invisible pairs
    bias         the sum of addend, likewise or None for 0, and of the biases of the terms; where it is -inf, so is
                 capped; with bias_after_softcap it is added to capped, of which max_logit then is
    terms        those of a `Request`: of its factors relative_scale alone is not in the multiplier; key_bias has a row
                 per query head or per key head; sinks broadcast to [B, Hq, Sq], -inf is no sink, +inf gives p = 0, NaN
                 gives NaN
    returns      out [B, Hq, Sq, Dv] in q's dtype; the others [B, Hq, Sq] in fp32 (fp64 for fp64 q)

    Operands keep their dtype; logits, softmax and accumulation are in fp32 (fp64 for fp64 q); p is rounded to
    v's dtype before it meets v. All results are differentiable; the lowest key that has the maximum takes the gradient
    of max_logit. A row without keys, or with a bias of -inf at all of them, gives out 0, lse = max_logit = -inf,
    entropy 0 and no gradient, whatever d_out holds there. Keys that no row attends to, and queries without keys, are
    replaced by zeros first, so that NaN and inf in them reach no result and no gradient.
    """
    dtype, softcap = torch.promote_types(q.dtype, torch.float32), terms.softcap
    bias = _biases(addend, terms, visibility, dtype)
    visible = visibility.dense()
    seen, attends = visible.any(-2)[..., None], visible.any(-1)[..., None]  # [B, Hq, Sk, 1], [B, Hq, Sq, 1]
    query = torch.where(attends, q.to(dtype), 0)
    key, value = (torch.where(seen, _per_query_head(x.to(dtype), visibility), 0) for x in (k, v))

    with without_autocast(q):
        products = query @ key.mT  # [B, Hq, Sq, Sk]
        if terms.relative_scale is not None:
            table = terms.relative_scale.to(dtype)
            multiplier = multiplier * relative_pairs(table, terms.relative_right, visibility, fill=1.0)
        if isinstance(multiplier, Tensor):
            multiplier = torch.where(visible, multiplier.double(), 0)  # 1 / (|q| |k|) may pass fp32
        logit, weighed = (products * multiplier).to(dtype), visible
        if bias is not None:
            bias = torch.where(visible, bias.to(dtype), 0)
            weighed = visible & (bias != -torch.inf)
            attends = weighed.any(-1)[..., None]
            if not terms.bias_after_softcap:
                logit = logit + bias
        logit = torch.where(visible, logit, 0)
        capped = logit if softcap is None else softcap * torch.tanh(logit / softcap)
        if bias is not None and terms.bias_after_softcap:
            logit = capped = capped + bias
        capped = torch.where(weighed, capped, -torch.inf)

        lse = _log_sum_exp(capped)
        softmax = probability = _softmax(capped)
        if terms.sinks is not None:
            gap = torch.where(attends, lse[..., None] - terms.sinks.to(dtype)[..., None], 0)
            probability = probability * logsigmoid(gap).exp()  # 1 - sigmoid, in its gradient, is 0 from a gap of 17 on
        if dropout is not None:
            heads = (visibility.batch, visibility.q_heads)
            rows, keys = slice(0, visibility.q_len), slice(0, visibility.k_len)
            keep = dropout.tile(heads, rows, keys, visibility.sequence_begins())
            probability = torch.where(keep, probability, 0) / (1 - dropout.p)
        out = torch.where(attends, probability.to(v.dtype).to(dtype) @ value, 0)

    entropy = torch.special.entr(torch.where(softmax == 0, 1, softmax)).sum(-1)  # at 0 its slope is infinite
    logit = pad(torch.where(weighed, logit, -torch.inf), (0, 1), value=-torch.inf)
    max_logit = logit.gather(-1, logit.detach().argmax(-1, keepdim=True)).squeeze(-1)
    return ForwardResult(out.to(q.dtype), lse, max_logit, entropy)


def _biases(addend: Tensor | None, terms: Terms, visibility: Visibility, dtype: torch.dtype) -> Tensor | None:
    """The sum of the biases, broadcastable to [B, Hq, Sq, Sk]; gradients are summed before they are rounded."""
    found = [] if addend is None else [addend]
    if terms.key_bias is not None:
        found.append(per_group(terms.key_bias.to(dtype), visibility).flatten(1, 2)[:, :, None])
    if terms.bias is not None:
        found.append(terms.bias.to(dtype))
    if terms.relative_bias is not None:
        found.append(relative_pairs(terms.relative_bias.to(dtype), terms.relative_right, visibility))
    return functools.reduce(operator.add, found) if found else None


def _per_query_head(x: Tensor, visibility: Visibility) -> Tensor:
    """x [B, Hkv, S, D] with every key head repeated for the query heads of its group: [B, Hq, S, D]."""
    group = visibility.q_heads // max(visibility.kv_heads, 1)
    return x.repeat_interleave(group, dim=1)


def _softmax(x: Tensor) -> Tensor:
    """exp(x) / sum exp(x) along the last axis; 0, with gradient 0, where all of x is -inf."""
    weight, _ = _shifted_exp(x)
    total = weight.sum(-1, keepdim=True)
    return weight / torch.where(total == 0, 1, total)


def _log_sum_exp(x: Tensor) -> Tensor:
    """ln sum exp(x) along the last axis; -inf, with gradient 0, where all of x is -inf."""
    weight, shift = _shifted_exp(x)
    total = weight.sum(-1)
    return torch.where(total == 0, -torch.inf, shift.squeeze(-1) + torch.where(total == 0, 1, total).log())


def _shifted_exp(x: Tensor) -> tuple[Tensor, Tensor]:
    """exp(x - shift) and shift, the maximum of x along the last axis, or 0 where that is -inf."""
    shift = _maximum(x)
    shift = torch.where(shift == -torch.inf, 0, shift)
    return torch.exp(x - shift), shift


def _maximum(x: Tensor) -> Tensor:
    """Detached maximum along the last axis, kept; -inf over no entries."""
    return pad(x.detach(), (0, 1), value=-torch.inf).amax(-1, keepdim=True)
