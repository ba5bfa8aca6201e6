"""Kernels that join the parts of splits: rows by their weights, gradients of keys by their sums."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...core.call import AttentionCall
from .block import LENGTHS, program_position, vector_from
from .launch import KERNELS, Specialisation, plan
from .records import Arguments, Results, Scale
from .softmax import LN_2, LOG2_E, lost_in_rounding


@triton.jit(do_not_specialize=LENGTHS)
def combine_splits(
    parts,
    results,
    sinks,
    q_len,
    splits,
    part_rows,
    q_heads,
    first_y,
    first_z,
    VALUE_DIM: tl.constexpr,
    BLOCK_DV: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """One row of a call from the parts that `attention_decode` or `attention_forward` wrote for the splits of its keys.

        lse        = ln sum_s exp(lse[s]),  w[s] = exp(lse[s] - lse)
        out        = sum_s w[s] * out[s]                 times exp(lse) / (exp(lse) + exp(sinks[row])) with sinks
        entropy    = sum_s w[s] * (entropy[s] - ln w[s])
        max_logit  = max_s max_logit[s]

    Grid: (Sq, Hq, B). results: `Results`. parts: such in fp32, [splits, B, Hq, Sq, ...] of part_rows = B * Hq * Sq rows
    each, without rounding; max_logit and entropy are None in both or in neither. Splits are added in one order. A row
    without keys gives out 0, lse = max_logit = -inf, entropy 0.
    """
    token, head, batch = program_position(first_y, first_z, LAST_FIRST=False)
    row = (batch.to(tl.int64) * q_heads + head) * q_len + token
    offs_value = tl.arange(0, BLOCK_DV)
    highest = tl.full([BLOCK_N], float("-inf"), tl.float32)  # [BLOCK_N]
    max_logit = highest
    for start in tl.range(0, splits, BLOCK_N):
        offs_split = start + tl.arange(0, BLOCK_N)
        keep = offs_split < splits
        part_row = row + offs_split.to(tl.int64) * part_rows  # [BLOCK_N]
        highest = tl.maximum(highest, tl.load(parts.lse + part_row, mask=keep, other=float("-inf")))
        if parts.max_logit is not None:
            part = tl.load(parts.max_logit + part_row, mask=keep, other=float("-inf"))
            max_logit = tl.maximum(max_logit, part)
    shift = tl.max(highest, 0)
    shift = tl.where(shift == float("-inf"), 0.0, shift)

    weight_sum = tl.zeros([BLOCK_N], tl.float32)  # [BLOCK_N]
    entropy_sum = weight_sum
    acc = tl.zeros([BLOCK_DV], tl.float32)  # [BLOCK_DV]
    for start in tl.range(0, splits, BLOCK_N):
        offs_split = start + tl.arange(0, BLOCK_N)
        keep = offs_split < splits
        part_row = row + offs_split.to(tl.int64) * part_rows  # [BLOCK_N]
        lse = tl.load(parts.lse + part_row, mask=keep, other=float("-inf"))
        keep = lse != float("-inf")
        log_weight = tl.where(keep, lse - shift, 0.0)
        weight = tl.where(keep, tl.exp2(log_weight * LOG2_E), 0.0)
        weight_sum += weight
        if parts.entropy is not None:
            part = tl.load(parts.entropy + part_row, mask=keep, other=0.0)
            entropy_sum += weight * (part - log_weight)
        out_ptrs = parts.out + part_row[:, None] * VALUE_DIM + offs_value[None, :]  # [BLOCK_N, BLOCK_DV]
        part = tl.load(out_ptrs, mask=keep[:, None] & (offs_value[None, :] < VALUE_DIM), other=0.0)
        acc += tl.sum(part * weight[:, None], 0)

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
    if sinks is not None:
        sink = tl.load(vector_from(sinks, batch, head, 0, token))
        with_sink = total + tl.exp2((sink - shift) * LOG2_E)
        total = tl.where(empty, total, with_sink)
    out = acc / total
    rounded = out.to(results.out.dtype.element_ty)
    tl.store(results.out + row * VALUE_DIM + offs_value, rounded, mask=offs_value < VALUE_DIM)
    if results.rounding is not None:
        lost = lost_in_rounding(out, rounded)
        tl.store(results.rounding + row * VALUE_DIM + offs_value, lost, mask=offs_value < VALUE_DIM)


@triton.jit(do_not_specialize=[*LENGTHS, "size"])
def sum_of_splits(parts_ptr, sum_ptr, splits, size, BLOCK_N: tl.constexpr):
    """sum[i] = parts[0, i] + parts[1, i] + ..., in this order, of BLOCK_N numbers.

    Grid: (cdiv(size, BLOCK_N), 1, 1). parts fp32 [splits, size], sum [size] of any dtype.
    """
    offsets = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    keep = offsets < size
    total = tl.zeros([BLOCK_N], tl.float32)
    for split in tl.range(0, splits):
        total += tl.load(parts_ptr + tl.cast(split, tl.int64) * size + offsets, mask=keep, other=0.0)
    tl.store(sum_ptr + offsets, total.to(sum_ptr.dtype.element_ty), mask=keep)


KERNELS |= {"combine_splits": combine_splits, "sum_of_splits": sum_of_splits}


def parts_of(call: AttentionCall, results: Results, splits: int) -> Results:
    """Room for the parts of results, [splits, B, Hq, Sq, ...] in fp32."""
    aux, out, lse = results.max_logit is not None, new_parts(call, results.out, splits), results.lse
    max_logit = new_parts(call, lse, splits, -torch.inf) if aux else None
    entropy = new_parts(call, lse, splits) if aux else None
    return Results(out, None, new_parts(call, lse, splits, -torch.inf), max_logit, entropy)


def new_parts(call: AttentionCall, result: Tensor, splits: int, fill: float = 0.0) -> Tensor:
    """Room for the parts [splits, ...] of a result, as `new_results`."""
    shape = (splits, *result.shape)
    if call.visibility.sequences is None:
        return result.new_empty(shape, dtype=torch.float32)
    return result.new_full(shape, fill, dtype=torch.float32)


def combine(specialisation: Specialisation, parts: Results, results: Results, sinks: Scale | None) -> None:
    """Join the parts of rows into results."""
    splits, batch, q_heads, q_len = parts.lse.shape
    arguments: Arguments = {"parts": parts, "results": results, "sinks": sinks, "q_len": q_len, "q_heads": q_heads}
    arguments |= {"splits": splits, "part_rows": batch * q_heads * q_len}
    chosen = plan("combine_splits", specialisation, parts.lse.device)
    chosen.launch((q_len, q_heads, batch), arguments, specialisation)


def add_splits(specialisation: Specialisation, parts: Tensor, result: Tensor) -> None:
    """Add up the parts [splits, ...] of a gradient. Its plan is not kept: gradients of one call differ in code."""
    chosen = plan("sum_of_splits", specialisation, parts.device)
    arguments = {"parts_ptr": parts, "sum_ptr": result, "splits": parts.shape[0], "size": result.numel()}
    chosen.launch((-(-result.numel() // chosen.config.block_n), 1, 1), arguments)
