"""Decode kernels: a few query rows against a split of a KV cache, and the combination of the splits."""

from __future__ import annotations

import triton
import triton.language as tl

from .forward import online_softmax, softmax_results, softmax_total
from .primitives import COUNTS, LENGTHS, LN_2, LOG2_E, TINY, load_tile, program_position, tile_offsets

# Blocks of keys in the shortest split: shorter ones would move more of their own results than of the cache.
SHORTEST_SPLIT = tl.constexpr(4)
_SIZES = ["page", "pages", "table_len", "splits"]


@triton.jit
def _keys_of_split(split, splits, first, end, BLOCK_N: tl.constexpr):
    """[start, stop) of a split of the keys [first, end): whole blocks, as evenly as SHORTEST_SPLIT allows."""
    blocks = tl.cdiv(tl.maximum(end - first, 0), BLOCK_N)
    size = tl.maximum(tl.cdiv(blocks, splits), SHORTEST_SPLIT) * BLOCK_N
    start = first + split * size
    return start, tl.minimum(start + size, end)


@triton.jit
def _key_offsets(
    first, number, slot, stride_b, stride_s, stride_d,
    BLOCK_N: tl.constexpr, COLUMNS: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """Offsets of a tile [BLOCK_N, COLUMNS] of keys: those from `first` on, or each at a slot of a numbered page."""
    if number is None:
        offsets = tl.cast(first, tl.int64) * stride_s + tile_offsets(BLOCK_N, COLUMNS, stride_s, stride_d, WIDE)
    else:
        row = number.to(tl.int64) * stride_b + slot.to(tl.int64) * stride_s
        offsets = row[:, None] + tl.arange(0, COLUMNS).to(tl.int64)[None, :] * stride_d
    return offsets


@triton.jit
def _rows_of_decode(tile, group, q_len, length, left, BLOCK_M: tl.constexpr):
    """(packed row, head of the group, query row, lo, hi) for BLOCK_M rows of a group's heads times Sq."""
    packed = tile * BLOCK_M + tl.arange(0, BLOCK_M)
    row = packed % q_len
    own = row + (length - q_len)
    lo = own * 0
    if left is not None:
        lo = tl.maximum(own - left, 0)
    return packed, packed // q_len, row, lo, own + 1


@triton.jit(do_not_specialize=[*LENGTHS, *_SIZES], do_not_specialize_on_alignment=COUNTS)
def attention_decode(
    q_ptr, k_ptr, v_ptr, query_scale_ptr, key_scale_ptr, cache_lengths_ptr, key_ranges_ptr, block_table_ptr, sinks_ptr,
    split_out_ptr, split_lse_ptr, split_max_logit_ptr, split_entropy_ptr,
    scale, softcap, left, q_len, capacity, page, pages, table_len, splits, q_heads, group, first_head, first_member,
    q_stride_b, q_stride_h, q_stride_s, q_stride_d, k_stride_b, k_stride_h, k_stride_s, k_stride_d,
    v_stride_b, v_stride_h, v_stride_s, v_stride_d, query_scale_stride_b, query_scale_stride_h, query_scale_stride_s,
    key_scale_stride_b, key_scale_stride_h, key_scale_stride_s,
    HEAD_DIM: tl.constexpr, VALUE_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, SUM_COLUMNS: tl.constexpr, PRECISION: tl.constexpr,
    WIDE: tl.constexpr,
):  # fmt: skip
    """Attention of the newest Sq tokens of one sequence, for the heads of one group, over one split of its cache.

        own         = i + length - Sq                                         row i sees own - left <= j <= own
        logit[i, j] = scale * (q[i] . k[j]) * query_scale[i] * key_scale[j]   capped with softcap
        lse[i]      = ln sum_j exp(logit[i, j])                               over the visible keys of the split
        out[i]      = sum_j exp(logit[i, j] - lse[i]) * v[j]

    Grid: (splits * cdiv(group * Sq, BLOCK_M), Hkv, B); the keys that some row sees are shared out by `_keys_of_split`;
    with splits = 1 the results are those of the call, else `combine_splits` joins them.

    q, k, v          [B, Hq, Sq, D], [B, Hkv, capacity, D], [B, Hkv, capacity, Dv]  fp16, bf16 or fp32, any strides
    block_table      int32 [B, table_len] contiguous or None: then k, v are pages [N, page, Hkv, D], N = `pages`, and
                     *_stride_b, *_stride_s are those of N and page; keys of pages outside [0, N) are zeros
    cache_lengths    int32 or int64 [B], clamped to [0, capacity], or None = capacity: the length, behind which nothing
                     is read
    key_ranges       int32 [B, 2] contiguous or None: of those keys each row sees lo <= j < hi, and hi narrows length
    query_scale      fp32 [B, Hq, Sq] or None = 1, any sign; key_scale  fp32 [B, Hkv, capacity] or None = 1
    sinks            fp32 [Hq] or None, with splits = 1 only
    split_out        [B, Hq, Sq, splits, Dv] contiguous; of several splits not written where a row sees no key of one
    split_lse, split_max_logit, split_entropy   fp32 [B, Hq, Sq, splits], natural log; the latter two may be None;
                     max_logit is uncapped

    Scales, sign and rounding as in `attention_forward`. Flash-Decoding: Dao et al. 2023,
    https://pytorch.org/blog/flash-decoding; pages: Kwon et al. 2023, arXiv:2309.06180.
    """
    block, kv_head, batch = program_position(first_head, first_member, LAST_FIRST=False)
    split, tile, kv_head, batch = block % splits, block // splits, kv_head.to(tl.int64), batch.to(tl.int64)
    length, first_key = capacity, batch.to(tl.int32) * 0
    if cache_lengths_ptr is not None:
        length = tl.minimum(tl.maximum(tl.load(cache_lengths_ptr + batch), 0), capacity).to(tl.int32)
    if key_ranges_ptr is not None:
        first_key = tl.maximum(tl.load(key_ranges_ptr + 2 * batch), 0)
        length = tl.minimum(tl.maximum(tl.load(key_ranges_ptr + 2 * batch + 1), 0), length)
    packed, member, row, lo, hi = _rows_of_decode(tile, group, q_len, length, left, BLOCK_M)
    keep_row = packed < group * q_len
    head = kv_head * group + member
    if left is not None:
        first_key = tl.maximum(length - q_len - left, first_key)
    start, stop = _keys_of_split(split, splits, first_key, length, BLOCK_N)

    wide_row = row.to(tl.int64)
    q_rows = batch * q_stride_b + head * q_stride_h + wide_row * q_stride_s
    q_offsets = q_rows[:, None] + tl.arange(0, BLOCK_D).to(tl.int64)[None, :] * q_stride_d
    q = load_tile(q_ptr + q_offsets, keep_row, HEAD_DIM, True)
    factor = tl.full([BLOCK_M], 1.0, tl.float32) * (scale * LOG2_E)
    if query_scale_ptr is not None:
        scale_rows = batch * query_scale_stride_b + head * query_scale_stride_h + wide_row * query_scale_stride_s
        factor *= tl.load(query_scale_ptr + scale_rows, mask=keep_row, other=0.0)
    q = tl.where((factor < 0)[:, None], -q, q)
    factor = tl.abs(factor)
    factor = tl.where(factor == 0.0, TINY, factor)

    k_ptr += kv_head * k_stride_h
    v_ptr += kv_head * v_stride_h
    if block_table_ptr is None:
        k_ptr += batch * k_stride_b
        v_ptr += batch * v_stride_b
    else:
        block_table_ptr += batch * table_len
    if key_scale_ptr is not None:
        key_scale_ptr += batch * key_scale_stride_b + kv_head * key_scale_stride_h

    running_max = tl.full([BLOCK_M], float("-inf"), tl.float32)
    running_sum = tl.zeros([BLOCK_M, SUM_COLUMNS], tl.float32)
    running_spread = running_sum
    ENTROPY: tl.constexpr = split_entropy_ptr is not None
    accumulator = tl.zeros([BLOCK_M, BLOCK_DV], tl.float32)
    for first in tl.range(start, stop, BLOCK_N):
        offs_key = first + tl.arange(0, BLOCK_N)
        keep_key = offs_key < stop
        load_key = keep_key
        number, slot = None, None
        if block_table_ptr is not None:
            number, slot = tl.load(block_table_ptr + offs_key // page, mask=keep_key, other=-1), offs_key % page
            load_key = keep_key & (number >= 0) & (number < pages)
        k_offsets = _key_offsets(first, number, slot, k_stride_b, k_stride_s, k_stride_d, BLOCK_N, BLOCK_D, WIDE)
        k = load_tile(k_ptr + k_offsets, load_key, HEAD_DIM, True)
        logits = tl.dot(q, k.T, input_precision=PRECISION)  # [BLOCK_M, BLOCK_N]
        if key_scale_ptr is not None:
            key_scale = tl.load(key_scale_ptr + offs_key.to(tl.int64) * key_scale_stride_s, mask=keep_key, other=0.0)
            logits *= key_scale[None, :]
        keep = keep_key[None, :] & (offs_key[None, :] < hi[:, None])
        if left is not None:
            keep = keep & (offs_key[None, :] >= lo[:, None])
        probabilities, decay, running_max, running_sum, running_spread = online_softmax(
            logits, keep, factor, softcap, running_max, running_sum, running_spread, True, ENTROPY
        )
        v_offsets = _key_offsets(first, number, slot, v_stride_b, v_stride_s, v_stride_d, BLOCK_N, BLOCK_DV, WIDE)
        v = load_tile(v_ptr + v_offsets, load_key, VALUE_DIM, True)
        accumulator = accumulator * decay[:, None]
        accumulator = tl.dot(probabilities.to(v.dtype), v, accumulator, input_precision=PRECISION)

    place = ((batch * q_heads + kv_head * group) * q_len + packed) * splits + split
    row_sum = tl.sum(running_sum, 1)
    shift, lse, max_logit, entropy = softmax_results(running_max, row_sum, tl.sum(running_spread, 1), factor, softcap)
    tl.store(split_lse_ptr + place, lse, mask=keep_row)
    if split_max_logit_ptr is not None:
        tl.store(split_max_logit_ptr + place, max_logit, mask=keep_row)
    if split_entropy_ptr is not None:
        tl.store(split_entropy_ptr + place, entropy, mask=keep_row)
    weight, total = softmax_total(row_sum, shift, sinks_ptr, tl.minimum(head, q_heads - 1))
    out = (accumulator * (weight / total)[:, None]).to(split_out_ptr.dtype.element_ty)
    offs_value = tl.arange(0, BLOCK_DV)
    written = keep_row & (tl.where(splits == 1, 1.0, row_sum) > 0.0)
    keep_out = written[:, None] & (offs_value[None, :] < VALUE_DIM)
    tl.store(split_out_ptr + place[:, None] * VALUE_DIM + offs_value[None, :], out, mask=keep_out)


@triton.jit(do_not_specialize=[*LENGTHS, *_SIZES], do_not_specialize_on_alignment=COUNTS)
def combine_splits(
    split_out_ptr, split_lse_ptr, split_max_logit_ptr, split_entropy_ptr, sinks_ptr,
    out_ptr, lse_ptr, max_logit_ptr, entropy_ptr, q_len, splits, q_heads, first_head, first_member,
    VALUE_DIM: tl.constexpr, BLOCK_DV: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """One row of a call from what `attention_decode` found in every split of its keys.

        lse        = ln sum_s exp(lse[s]),  w[s] = exp(lse[s] - lse)
        out        = sum_s w[s] * out[s]                 times exp(lse) / (exp(lse) + exp(sink)) with a sink
        entropy    = sum_s w[s] * (entropy[s] - ln w[s])
        max_logit  = max_s max_logit[s]

    Grid: (Sq, Hq, B). split_out fp32 [B, Hq, Sq, splits, Dv], the other parts fp32 [B, Hq, Sq, splits]; out [B, Hq, Sq,
    Dv], lse, max_logit, entropy [B, Hq, Sq], the latter two None like their parts. Splits are added in one order. A row
    without keys gives out 0, lse = max_logit = -inf, entropy 0.
    """
    token, head, batch = program_position(first_head, first_member, LAST_FIRST=False)
    row = (batch.to(tl.int64) * q_heads + head) * q_len + token
    first = row * splits
    offs_value = tl.arange(0, BLOCK_DV)
    highest = tl.full([BLOCK_N], float("-inf"), tl.float32)
    max_logit = highest
    for start in tl.range(0, splits, BLOCK_N):
        offs_split = start + tl.arange(0, BLOCK_N)
        keep = offs_split < splits
        highest = tl.maximum(highest, tl.load(split_lse_ptr + first + offs_split, mask=keep, other=float("-inf")))
        if split_max_logit_ptr is not None:
            part = tl.load(split_max_logit_ptr + first + offs_split, mask=keep, other=float("-inf"))
            max_logit = tl.maximum(max_logit, part)
    shift = tl.max(highest, 0)
    shift = tl.where(shift == float("-inf"), 0.0, shift)

    weight_sum = tl.zeros([BLOCK_N], tl.float32)
    entropy_sum = weight_sum
    accumulator = tl.zeros([BLOCK_DV], tl.float32)
    for start in tl.range(0, splits, BLOCK_N):
        offs_split = start + tl.arange(0, BLOCK_N)
        keep = offs_split < splits
        lse = tl.load(split_lse_ptr + first + offs_split, mask=keep, other=float("-inf"))
        keep = lse != float("-inf")
        log_weight = tl.where(keep, lse - shift, 0.0)
        weight = tl.where(keep, tl.exp2(log_weight * LOG2_E), 0.0)
        weight_sum += weight
        if split_entropy_ptr is not None:
            part = tl.load(split_entropy_ptr + first + offs_split, mask=keep, other=0.0)
            entropy_sum += weight * (part - log_weight)
        out_ptrs = split_out_ptr + (first + offs_split)[:, None] * VALUE_DIM + offs_value[None, :]
        part = tl.load(out_ptrs, mask=keep[:, None] & (offs_value[None, :] < VALUE_DIM), other=0.0)
        accumulator += tl.sum(part * weight[:, None], 0)

    total = tl.sum(weight_sum, 0)
    empty = total == 0.0
    total = tl.where(empty, 1.0, total)
    log_total = tl.log2(total) * LN_2
    tl.store(lse_ptr + row, tl.where(empty, float("-inf"), shift + log_total))
    if max_logit_ptr is not None:
        # A GPU's maximum passes over NaN, which the sum keeps.
        tl.store(max_logit_ptr + row, tl.where(total == total, tl.max(max_logit, 0), total))
    if entropy_ptr is not None:
        entropy = tl.sum(entropy_sum, 0) / total + log_total
        tl.store(entropy_ptr + row, tl.where(entropy < 0.0, 0.0, entropy))
    if sinks_ptr is not None:
        total += tl.exp2((tl.load(sinks_ptr + head) - shift) * LOG2_E)
    out = (accumulator / total).to(out_ptr.dtype.element_ty)
    tl.store(out_ptr + row * VALUE_DIM + offs_value, out, mask=offs_value < VALUE_DIM)
