"""The splits of decode, joined."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from .block import LENGTHS, LN_2, LOG2_E, Results, program_position
from .launch import KERNELS, Kind, plan


@triton.jit(do_not_specialize=[*LENGTHS, "splits"])
def combine_splits(
    parts,
    results,
    sinks_ptr,
    q_len,
    splits,
    q_heads,
    first_y,
    first_z,
    VALUE_DIM: tl.constexpr,
    BLOCK_DV: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """One row of a call from what `attention_decode` found in every split of its keys.

        lse        = ln sum_s exp(lse[s]),  w[s] = exp(lse[s] - lse)
        out        = sum_s w[s] * out[s]                 times exp(lse) / (exp(lse) + exp(sink)) with a sink
        entropy    = sum_s w[s] * (entropy[s] - ln w[s])
        max_logit  = max_s max_logit[s]

    Grid: (Sq, Hq, B). parts, results: `Results` without rounding, the parts in fp32 with splits as an axis behind Sq;
    max_logit and entropy are None in both or in neither. Splits are added in one order. A row without keys gives out 0,
    lse = max_logit = -inf, entropy 0.
    """
    token, head, batch = program_position(first_y, first_z, LAST_FIRST=False)
    row = (batch.to(tl.int64) * q_heads + head) * q_len + token
    first = row * splits
    offs_value = tl.arange(0, BLOCK_DV)
    highest = tl.full([BLOCK_N], float("-inf"), tl.float32)
    max_logit = highest
    for start in tl.range(0, splits, BLOCK_N):
        offs_split = start + tl.arange(0, BLOCK_N)
        keep = offs_split < splits
        highest = tl.maximum(highest, tl.load(parts.lse + first + offs_split, mask=keep, other=float("-inf")))
        if parts.max_logit is not None:
            part = tl.load(parts.max_logit + first + offs_split, mask=keep, other=float("-inf"))
            max_logit = tl.maximum(max_logit, part)
    shift = tl.max(highest, 0)
    shift = tl.where(shift == float("-inf"), 0.0, shift)

    weight_sum = tl.zeros([BLOCK_N], tl.float32)
    entropy_sum = weight_sum
    accumulator = tl.zeros([BLOCK_DV], tl.float32)
    for start in tl.range(0, splits, BLOCK_N):
        offs_split = start + tl.arange(0, BLOCK_N)
        keep = offs_split < splits
        lse = tl.load(parts.lse + first + offs_split, mask=keep, other=float("-inf"))
        keep = lse != float("-inf")
        log_weight = tl.where(keep, lse - shift, 0.0)
        weight = tl.where(keep, tl.exp2(log_weight * LOG2_E), 0.0)
        weight_sum += weight
        if parts.entropy is not None:
            part = tl.load(parts.entropy + first + offs_split, mask=keep, other=0.0)
            entropy_sum += weight * (part - log_weight)
        out_ptrs = parts.out + (first + offs_split)[:, None] * VALUE_DIM + offs_value[None, :]
        part = tl.load(out_ptrs, mask=keep[:, None] & (offs_value[None, :] < VALUE_DIM), other=0.0)
        accumulator += tl.sum(part * weight[:, None], 0)

    total = tl.sum(weight_sum, 0)
    empty = total == 0.0
    total = tl.where(empty, 1.0, total)
    log_total = tl.log2(total) * LN_2
    tl.store(results.lse + row, tl.where(empty, float("-inf"), shift + log_total))
    if results.max_logit is not None:
        # tl.max ignores NaN; the sum keeps it.
        tl.store(results.max_logit + row, tl.where(total == total, tl.max(max_logit, 0), total))
    if results.entropy is not None:
        entropy = tl.sum(entropy_sum, 0) / total + log_total
        tl.store(results.entropy + row, tl.where(entropy < 0.0, 0.0, entropy))
    if sinks_ptr is not None:
        with_sink = total + tl.exp2((tl.load(sinks_ptr + head) - shift) * LOG2_E)
        total = tl.where(empty, total, with_sink)
    out = (accumulator / total).to(results.out.dtype.element_ty)
    tl.store(results.out + row * VALUE_DIM + offs_value, out, mask=offs_value < VALUE_DIM)


KERNELS["decode_combine"] = combine_splits


def combine(parts: Results, joined: Results, sinks: Tensor | None, splits: int, kind: Kind) -> None:
    """Write `joined` from the `parts` of several splits."""
    batch, q_heads, q_len = joined.lse.shape
    arguments = {"parts": parts, "results": joined, "sinks_ptr": sinks}
    arguments |= {"q_len": q_len, "splits": splits, "q_heads": q_heads}
    plan("decode_combine", kind.problem, joined.lse.device).launch((q_len, q_heads, batch), arguments, False, kind)
