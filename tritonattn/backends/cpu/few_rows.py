"""Few bf16 rows, as of a step over a cache: products in bf16, logits and their softmax in fp32.

oneDNN adds up in fp32 and rounds each product of q and k to bf16; another product, from which the rounded one is
subtracted before it is rounded itself, returns what that lost. Keys are read twice, but never widened. Probabilities
are rounded to bf16 before they meet the values, as in PyTorch's kernel.
"""

from __future__ import annotations

import functools

import torch

from ...core.autograd import needs_graph, values_are_read
from ...core.call import AttentionCall, ForwardResult
from ...core.terms import has_any, others_than
from ...core.visibility import Visibility

# Rows of a call that are few: the query heads of a key head are then handed over as rows.
FEW_ROWS = 16

# The largest logit: each is off by 2^-17 of the product of its norms, and its probability by as much.
_LARGEST_LOGIT = 64.0

# Fewer keys are widened in the time of the operators that this takes more.
_LEAST_KEYS = 256

_OTHERS = others_than("query_scale", "key_scale")


def takes(call: AttentionCall) -> bool:
    """True for bf16 calls of few rows that would widen keys: lone rows of a key head, and those with scales."""
    terms, visible = call.terms, call.visibility
    if call.v.dtype != torch.bfloat16 or call.dropout is not None or call.aux or visible.invariant:
        return False
    if has_any(terms, _OTHERS):
        return False
    rows = visible.q_len * visible.q_heads // max(visible.kv_heads, 1)
    is_scaled = terms.query_scale is not None or terms.key_scale is not None
    if rows > (FEW_ROWS if is_scaled else 1) or visible.k_len < _LEAST_KEYS or call.block_table is not None:
        return False
    tensors = call.tensors()
    is_read = values_are_read(*tensors) and not needs_graph(*tensors)
    # Keys of heads that lie apart, as the first of a cache, take oneDNN longer than to widen them.
    return is_read and call.q.dtype == call.k.dtype == torch.bfloat16 and call.k.is_contiguous() and _adds_in_fp32()


def attention(call: AttentionCall) -> ForwardResult | None:
    """The output [B, Hq, Sq, Dv] of a call that it `takes`, without an lse.

    None unless rows attend to all keys, or to most of caches of one length, and for large logits and NaN.
    """
    terms, visible = call.terms, call.visibility
    length = visible.k_len if visible.is_full else 0
    if visible.at_lengths:
        length = one_length(visible)
    if 4 * length < 3 * visible.k_len:  # q meets the others too
        return None
    shape = visible.batch * visible.kv_heads, -1
    q, keys = call.q.reshape(*shape, call.q.shape[3]), call.k.flatten(0, 1).mT
    product = torch.bmm(q, keys)
    lost = torch.baddbmm(product, q, keys, beta=-1)[..., :length]
    logit = product[..., :length].float().add_(lost).mul_(terms.scale)
    if terms.query_scale is not None:
        logit.mul_(terms.query_scale.reshape(*shape, 1))
    if terms.key_scale is not None:
        logit.mul_(terms.key_scale[..., :length].reshape(shape[0], 1, length))
    least, most = map(float, logit.aminmax())
    if not -_LARGEST_LOGIT <= least <= most <= _LARGEST_LOGIT:
        return None
    out = torch.bmm(logit.softmax(-1).to(call.v.dtype), call.v[:, :, :length].flatten(0, 1))
    return ForwardResult(out.view(*call.q.shape[:3], call.v.shape[3]), None)  # pyright: ignore[reportArgumentType]


def one_length(visible: Visibility) -> int:
    """The keys of each cache, for a lone row that attends to all of them; 0 where they differ or are not read."""
    return visible.shared("one length", lambda: _one_length(visible))


def _one_length(visible: Visibility) -> int:
    is_lone = visible.q_len == 1 and visible.left is None and visible.row_counts is None
    if not (is_lone and visible.key_lengths is not None and values_are_read(visible.key_lengths)):
        return 0
    least, most = map(int, visible.key_lengths.aminmax())
    return least if least == most else 0


@functools.cache
def _adds_in_fp32() -> bool:
    """True where a second product returns what rounding the first to bf16 lost: 1 of 257 ones."""
    if torch.backends.cpu.get_cpu_capability() != "AVX512":
        return False
    q, keys = torch.ones(1, 1, 257, dtype=torch.bfloat16), torch.ones(1, 257, _LEAST_KEYS, dtype=torch.bfloat16)
    product = torch.bmm(q, keys)
    return bool((product == 256).all() and (torch.baddbmm(product, q, keys, beta=-1) == 1).all())
