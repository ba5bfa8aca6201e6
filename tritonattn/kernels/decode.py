"""Decode kernels: a few query rows against a split of a KV cache, and the combination of the splits."""

from __future__ import annotations

import triton
import triton.language as tl

from .addresses import begin, begin_bias, begin_pages, begin_scale, in_vectors, load_paged, page_slots
from .forward import Softmax, online_softmax, softmax_results, softmax_total, store_statistics
from .primitives import LENGTHS, LN_2, LOG2_E, TINY, load_tile, program_position, tile_offsets

# Blocks of keys in the shortest split: shorter ones would move more of their own results than of the cache.
SHORTEST_SPLIT = tl.constexpr(4)
_SIZES = ["group", "length_words", "splits"]


@triton.jit
def _keys_of_split(split, splits, first, end, BLOCK_N: tl.constexpr):
    """[start, stop) of a split of the keys [first, end): whole blocks, as evenly as SHORTEST_SPLIT allows."""
    blocks = tl.cdiv(tl.maximum(end - first, 0), BLOCK_N)
    size = tl.maximum(tl.cdiv(blocks, splits), SHORTEST_SPLIT) * BLOCK_N
    start = first + split * size
    return start, tl.minimum(start + size, end)


@triton.jit
def _integer_at(ptr, index, words):
    """Integer `index` of int32, or of int64, whose words are 2, as int64: one code reads both."""
    low, high = tl.load(ptr + index * words), tl.load(ptr + index * words + (words - 1))
    return tl.where(words == 1, low.to(tl.int64), (high.to(tl.int64) << 32) | (low.to(tl.int64) & 0xFFFFFFFF))


@triton.jit
def _sequence_of_decode(batch, ranges, query_lengths, q_len, capacity, length_words):
    """(first_key, length, new) of a sequence: it has the keys first_key <= j < length, and the last `new` as rows."""
    length, first_key = capacity, batch.to(tl.int32) * 0
    if ranges.key_lengths is not None:
        given = _integer_at(ranges.key_lengths, batch, length_words)
        length = tl.minimum(tl.maximum(given, 0), capacity).to(tl.int32)
    if ranges.key_ranges is not None:
        first_key = tl.maximum(tl.load(ranges.key_ranges + 2 * batch), 0)
        length = tl.minimum(tl.maximum(tl.load(ranges.key_ranges + 2 * batch + 1), 0), length)
    new = q_len
    if query_lengths is not None:
        new = tl.minimum(tl.maximum(tl.load(query_lengths + batch), 0), q_len)
    return first_key, length, new


@triton.jit
def _load_keys(
    x, first, keep, number, slot, COLUMNS: tl.constexpr, WIDTH: tl.constexpr, BLOCK_N: tl.constexpr, WIDE: tl.constexpr
):
    """The tile of x with the keys from `first` on, or with each at a slot of a numbered page."""
    if number is None:
        offsets = tl.cast(first, tl.int64) * x.s + tile_offsets(BLOCK_N, COLUMNS, x.s, x.d, WIDE)
        tile = load_tile(x.ptr + offsets, keep, WIDTH, True)
    else:
        tile = load_paged(x, number, slot, keep, COLUMNS, WIDTH, WIDE)
    return tile


@triton.jit
def _rows_of_decode(tile, group, q_len, new, length, left, BLOCK_M: tl.constexpr):
    """(packed row, head of the group, query row, lo, hi) for BLOCK_M rows of a group's heads times Sq."""
    packed = tile * BLOCK_M + tl.arange(0, BLOCK_M)
    row = packed % q_len
    own = row + (length - new)
    lo = own * 0
    if left is not None:
        lo = tl.maximum(own - left, 0)
    return packed, packed // q_len, row, lo, own + 1


@triton.jit(do_not_specialize=[*LENGTHS, *_SIZES])
def attention_decode(
    q,
    k,
    v,
    query_scale,
    key_scale,
    key_bias,
    ranges,
    query_lengths,
    pages,
    results,
    logit_terms,
    left,
    q_len,
    capacity,
    length_words,
    splits,
    q_heads,
    group,
    first_y,
    first_z,
    HEAD_DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    SUM_COLUMNS: tl.constexpr,
    WIDE: tl.constexpr,
    ALIGNED: tl.constexpr,
):
    """Attention of the newest Sq tokens of one sequence, for the heads of one group, over one split of its cache.

        own         = i + length - new                                        row i sees own - left <= j <= own
        logit[i, j] = scale * (q[i] . k[j]) * query_scale[i] * key_scale[j] + key_bias[j]     capped with softcap
        lse[i]      = ln sum_j exp(logit[i, j])                               over the visible keys of the split
        out[i]      = sum_j exp(logit[i, j] - lse[i]) * v[j]

    Grid: (splits * cdiv(group * Sq, BLOCK_M), Hkv, B); the keys that some row sees are shared out by `_keys_of_split`;
    with splits = 1 the results are those of the call, else `combine_splits` joins them.

    q, k, v          [B, Hq, Sq, D], [B, Hkv, capacity, D], [B, Hkv, capacity, Dv]  fp16, bf16 or fp32, any strides
    pages            `Pages` of the sequences or None; then k, v are [N, Hkv, page, D or Dv]
    query_lengths    int32 [B] or None = Sq: new, the rows of each sequence, clamped to [0, Sq]; later ones see no key
    key_lengths      int32 [B], or int64 as int32 [2 * B] with length_words = 2, clamped to [0, capacity], or None =
                     capacity: the length, behind which nothing is read
    key_ranges       int32 [B, 2] contiguous or None: of those keys each row sees lo <= j < hi, and hi narrows length
    query_scale      fp32 [B, Hq, Sq] or None = 1, any sign; key_scale  fp32 [B, Hkv, capacity] or None = 1
    key_bias         fp32 [B, Hkv, group, capacity] or None = 0; a key with -inf has no weight
    logit_terms      `LogitTerms`, sinks with splits = 1 only
    results          a `Results` without rounding, splits an axis behind Sq: out [B, Hq, Sq, splits, Dv], of several
                     splits not written where a row sees no key of one; lse natural log, max_logit uncapped

    Scales, sign and rounding as in `attention_forward`. Flash-Decoding: Dao et al. 2023,
    https://pytorch.org/blog/flash-decoding; pages: Kwon et al. 2023, arXiv:2309.06180.
    """
    block, kv_head, batch = program_position(first_y, first_z, LAST_FIRST=False)
    q, k, v = in_vectors(q, ALIGNED), in_vectors(k, ALIGNED), in_vectors(v, ALIGNED)
    split, tile, kv_head, batch = block % splits, block // splits, kv_head.to(tl.int64), batch.to(tl.int64)
    first_key, length, new = _sequence_of_decode(batch, ranges, query_lengths, q_len, capacity, length_words)
    packed, member, row, lo, hi = _rows_of_decode(tile, group, q_len, new, length, left, BLOCK_M)
    if query_lengths is not None:
        hi = tl.where(row < new, hi, 0)
    keep_row = packed < group * q_len
    head = kv_head * group + member
    if left is not None:
        first_key = tl.maximum(length - new - left, first_key)
    start, stop = _keys_of_split(split, splits, first_key, length, BLOCK_N)

    wide_row = row.to(tl.int64)
    q_rows = batch * q.b + head * q.h + wide_row * q.s
    q_offsets = q_rows[:, None] + tl.arange(0, BLOCK_D).to(tl.int64)[None, :] * q.d
    q_tile = load_tile(q.ptr + q_offsets, keep_row, HEAD_DIM, True)
    factor = tl.full([BLOCK_M], 1.0, tl.float32) * (logit_terms.scale * LOG2_E)
    if query_scale is not None:
        factor *= tl.load(begin_scale(query_scale, batch, head, row).ptr, mask=keep_row, other=0.0)
    q_tile = tl.where((factor < 0)[:, None], -q_tile, q_tile)
    factor = tl.abs(factor)
    if key_bias is None:
        factor = tl.where(factor == 0.0, TINY, factor)

    entry = batch
    if pages is not None:
        entry, pages = batch * 0, begin_pages(pages, batch)  # pages are numbered through
    k, v = begin(k, entry, kv_head, 0), begin(v, entry, kv_head, 0)
    if key_scale is not None:
        key_scale = begin_scale(key_scale, batch, kv_head, 0)
    if key_bias is not None:
        key_bias = begin_bias(key_bias, batch, kv_head, member, 0)

    running_max = tl.full([BLOCK_M], float("-inf"), tl.float32)
    running_sum = tl.zeros([BLOCK_M, SUM_COLUMNS], tl.float32)
    state = Softmax(tl.zeros([BLOCK_M, BLOCK_DV], tl.float32), running_max, running_sum, running_sum)
    ENTROPY: tl.constexpr = results.entropy is not None
    for first in tl.range(start, stop, BLOCK_N):
        offs_key = first + tl.arange(0, BLOCK_N)
        keep_key = offs_key < stop
        load_key = keep_key
        number, slot = None, None
        if pages is not None:
            number, slot, load_key = page_slots(pages, offs_key, keep_key, True)
        k_tile = _load_keys(k, first, load_key, number, slot, BLOCK_D, HEAD_DIM, BLOCK_N, WIDE)
        logits = tl.dot(q_tile, k_tile.T, input_precision="ieee")  # [BLOCK_M, BLOCK_N]
        if key_scale is not None:
            scale_ptrs = key_scale.ptr + offs_key.to(tl.int64) * key_scale.s
            logits *= tl.load(scale_ptrs, mask=keep_key, other=0.0)[None, :]
        bias = None
        if key_bias is not None:
            bias_ptrs = key_bias.ptr[:, None] + (offs_key.to(tl.int64) * key_bias.s)[None, :]
            bias = tl.load(bias_ptrs, mask=keep_row[:, None] & keep_key[None, :], other=0.0) * LOG2_E
        keep = keep_key[None, :] & (offs_key[None, :] < hi[:, None])
        if left is not None:
            keep = keep & (offs_key[None, :] >= lo[:, None])
        probabilities, decay, running_max, running_sum, running_spread = online_softmax(
            logits, bias, keep, factor, logit_terms.softcap, state, True, ENTROPY
        )
        v_tile = _load_keys(v, first, load_key, number, slot, BLOCK_DV, VALUE_DIM, BLOCK_N, WIDE)
        accumulator = state.accumulator * decay[:, None]
        accumulator = tl.dot(probabilities.to(v_tile.dtype), v_tile, accumulator, input_precision="ieee")
        state = Softmax(accumulator, running_max, running_sum, running_spread)

    place = ((batch * q_heads + kv_head * group) * q_len + packed) * splits + split
    row_sum, shift, lse, max_logit, entropy = softmax_results(state, factor, logit_terms.softcap)
    store_statistics(results, place, lse, max_logit, entropy, keep_row)
    weight, total = softmax_total(row_sum, shift, logit_terms.sinks, tl.minimum(head, q_heads - 1))
    out = (state.accumulator * (weight / total)[:, None]).to(results.out.dtype.element_ty)
    offs_value = tl.arange(0, BLOCK_DV)
    written = keep_row & (tl.where(splits == 1, 1.0, row_sum) > 0.0)
    keep_out = written[:, None] & (offs_value[None, :] < VALUE_DIM)
    tl.store(results.out + place[:, None] * VALUE_DIM + offs_value[None, :], out, mask=keep_out)


@triton.jit(do_not_specialize=[*LENGTHS, *_SIZES])
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
