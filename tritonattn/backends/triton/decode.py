"""Decode kernel: a few query rows against a split of a KV cache."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ...core.call import AttentionCall, ForwardResult
from ...core.eight_bit import EIGHT_BIT
from ...tuning import config
from ...tuning.config import padded_dim
from .attention import Prepared, launch_in_splits, launch_kernel, operand_arguments, sizes_of, specialisation_of
from .block import LENGTHS, from_row, load_tile, page_slots, program_position, tile_offsets, vector_from
from .grids import over_groups
from .launch import KERNELS
from .pairs import pair_terms
from .records import Arguments, Results, bounded
from .softmax import LOG2_E, TINY, finish_softmax, moved_sums, probabilities, soft_cap, softcap_of_rows

SHORTEST_SPLIT = tl.constexpr(config.SHORTEST_SPLIT)
_SIZES = ["group", "length_words"]


@triton.jit
def _keys_of_split(split, splits, first, end, BLOCK_N: tl.constexpr):
    """The keys [start, stop) of a split of [first, end): whole blocks, as evenly as SHORTEST_SPLIT allows."""
    blocks = tl.cdiv(tl.maximum(end - first, 0), BLOCK_N)
    size = tl.maximum(tl.cdiv(blocks, splits), SHORTEST_SPLIT) * BLOCK_N
    start = first + split * size
    return start, tl.minimum(start + size, end)


@triton.jit
def _integer_at(ptr, index, words):
    """Integer `index` of int32, of 1 word each, or of int64, of 2, as int64: one code reads both."""
    low, high = tl.load(ptr + index * words), tl.load(ptr + index * words + (words - 1))
    return tl.where(words == 1, low.to(tl.int64), (high.to(tl.int64) << 32) | (low.to(tl.int64) & 0xFFFFFFFF))


@triton.jit
def _sequence_of_decode(batch, key_lengths, key_ranges, query_lengths, q_len, capacity, length_words):
    """(first_key, length, new) of a sequence: it has the keys first_key <= j < length, and the last `new` as rows."""
    length, first_key = capacity, batch.to(tl.int32) * 0
    if key_lengths is not None:
        given = _integer_at(key_lengths, batch, length_words)
        length = tl.minimum(tl.maximum(given, 0), capacity).to(tl.int32)
    if key_ranges is not None:
        first_key = tl.maximum(tl.load(key_ranges + 2 * batch), 0)
        length = tl.minimum(tl.maximum(tl.load(key_ranges + 2 * batch + 1), 0), length)
    new = q_len
    if query_lengths is not None:
        new = tl.minimum(tl.maximum(tl.load(query_lengths + batch), 0), q_len)
    return first_key, length, new


@triton.jit(do_not_specialize=[*LENGTHS, *_SIZES])
def attention_decode(
    q,
    k,
    v,
    terms,
    extent,
    relative_right,
    key_lengths,
    key_ranges,
    query_lengths,
    pages,
    results,
    scale,
    softcap,
    sinks,
    left,
    q_len,
    capacity,
    length_words,
    splits,
    part_rows,
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
    HAS_BIAS: tl.constexpr,
    WIDE: tl.constexpr,
    ALIGNED: tl.constexpr,
):
    """Attention of the newest Sq tokens of one sequence, for the heads of one group, over one split of its cache.

        pos         = i + length - new                                        pos - left <= j <= pos is visible to row i
        logit[i, j] = scale * (q[i] . k[j]) * query_scale[i] * key_scale[j] * r[i, j] + b[i, j]     capped with softcap
        b[i, j]     = key_bias[j] + bias[i, j] + relative_bias[i, pos - j + relative_right]
        r[i, j]     = relative_scale[i, pos - j + relative_right]
        lse[i]      = ln sum_j exp(logit[i, j])                               over the visible keys of the split
        out[i]      = sum_j exp(logit[i, j] - lse[i]) * v[j]

    Grid: (splits * cdiv(group * Sq, BLOCK_M), Hkv, B); the visible keys are shared out by `_keys_of_split`; with
    splits = 1 the results are those of the call, else `combine_splits` joins them.

    q, k, v          [B, Hq, Sq, D], [B, Hkv, capacity, D], [B, Hkv, capacity, Dv]  fp16, bf16 or fp32, any strides;
                     k and v of 8 bits are converted to q's as they are loaded
    pages            `Pages` of the sequences or None; then k, v are [N, Hkv, page, D or Dv]
    query_lengths    int32 [B] or None = Sq: new, the rows of each sequence, clamped to [0, Sq]; later ones have no keys
    key_lengths      int32 [B], or int64 as int32 [2 * B] with length_words = 2, clamped to [0, capacity], or None =
                     capacity: the length, behind which nothing is read
    key_ranges       int32 [B, 2] contiguous or None: only lo <= j < hi is visible, and hi narrows length
    terms, sinks, extent   as in `attention_forward`, with Sk = capacity; sinks with splits = 1 only
    results          a `Results` without rounding; of several splits their parts, of part_rows = B * Hq * Sq rows each,
                     out not written where a row has no key in one; lse natural log, max_logit uncapped

    Scales, sign and rounding as in `attention_forward`. Flash-Decoding: Dao et al. 2023,
    https://pytorch.org/blog/flash-decoding; pages: Kwon et al. 2023, arXiv:2309.06180.
    """
    block, kv_head, batch = program_position(first_y, first_z, LAST_FIRST=False)
    split, tile, kv_head, batch = block % splits, block // splits, kv_head.to(tl.int64), batch.to(tl.int64)
    first_key, length, new = _sequence_of_decode(
        batch, key_lengths, key_ranges, query_lengths, q_len, capacity, length_words
    )
    packed = tile * BLOCK_M + tl.arange(0, BLOCK_M)  # [BLOCK_M]: of the heads of a group times Sq
    group_head, row = packed // q_len, packed % q_len
    keep_row = packed < group * q_len  # [BLOCK_M]
    head = kv_head * group + group_head
    position = row + (length - new)  # [BLOCK_M]
    lo, hi = position * 0, position + 1
    if query_lengths is not None:
        hi = tl.where(row < new, hi, 0)
    if left is not None:
        lo = tl.maximum(position - left, 0)
        first_key = tl.maximum(length - new - left, first_key)
    start, stop = _keys_of_split(split, splits, first_key, length, BLOCK_N)

    q = from_row(q, batch, 0, 0, ALIGNED)
    q_rows = head * q.h + row.to(tl.int64) * q.s
    q_ptrs = q.ptr + (q_rows[:, None] + tl.arange(0, BLOCK_D).to(tl.int64)[None, :] * q.d)  # [BLOCK_M, BLOCK_D]
    q_tile = load_tile(q_ptrs, keep_row, HEAD_DIM)  # [BLOCK_M, BLOCK_D]
    factor = tl.full([BLOCK_M], 1.0, tl.float32) * (scale * LOG2_E)  # [BLOCK_M]
    if terms.query_scale is not None:
        factor *= tl.load(vector_from(terms.query_scale, batch, head, 0, row), mask=keep_row, other=0.0)
    q_tile = tl.where((factor < 0)[:, None], -q_tile, q_tile)
    factor = tl.abs(factor)
    if terms.query_scale_after_softcap is not None:
        softcap = softcap_of_rows(softcap, factor, scale)  # [BLOCK_M]
    if not HAS_BIAS:
        factor = tl.where(factor == 0.0, TINY, factor)

    entry = batch
    if pages is not None:
        entry = batch * 0  # pages are numbered through
    k, v = from_row(k, entry, kv_head, 0, ALIGNED), from_row(v, entry, kv_head, 0, ALIGNED)
    block_keys = tl.arange(0, BLOCK_N)
    k_offsets = tile_offsets(block_keys, BLOCK_D, k.s, k.d, WIDE)  # [BLOCK_N, BLOCK_D]
    v_offsets = tile_offsets(block_keys, BLOCK_DV, v.s, v.d, WIDE)  # [BLOCK_N, BLOCK_DV]
    if terms.key_scale is not None:
        key_scale_ptr = vector_from(terms.key_scale, batch, kv_head, 0, 0)
    if terms.key_bias is not None:
        key_bias_ptrs = vector_from(terms.key_bias, batch, kv_head, group_head, 0)[:, None]  # [BLOCK_M, 1]

    HAS_PAIRS: tl.constexpr = terms.bias is not None or terms.relative_bias is not None
    READS_PAIRS: tl.constexpr = HAS_PAIRS or terms.relative_scale is not None
    shift = length - new  # of `pair_terms`
    if relative_right is not None:
        shift += relative_right
    acc = tl.zeros([BLOCK_M, BLOCK_DV], tl.float32)  # [BLOCK_M, BLOCK_DV]
    m_i = tl.full([BLOCK_M], float("-inf"), tl.float32)  # [BLOCK_M]
    l_i = tl.zeros([BLOCK_M, SUM_COLUMNS], tl.float32)  # [BLOCK_M, SUM_COLUMNS]
    spread = l_i  # for the entropy: sum_j exp(z - shift) * (z - shift)
    for start_n in tl.range(start, stop, BLOCK_N):
        offs_n = start_n + block_keys  # [BLOCK_N]
        keep_key = offs_n < stop  # [BLOCK_N]
        if pages is None:
            k_ptrs = k.ptr + (tl.cast(start_n, tl.int64) * k.s + k_offsets)  # [BLOCK_N, BLOCK_D]
            k_tile = load_tile(k_ptrs, keep_key, HEAD_DIM, q_tile.dtype)  # [BLOCK_N, BLOCK_D]
        else:
            number, slot, is_held = page_slots(pages, batch, offs_n, keep_key)
            number = number.to(tl.int64)[:, None]  # [BLOCK_N, 1]
            k_ptrs = k.ptr + number * k.b + tile_offsets(slot, BLOCK_D, k.s, k.d, WIDE)  # [BLOCK_N, BLOCK_D]
            k_tile = load_tile(k_ptrs, is_held, HEAD_DIM, q_tile.dtype)  # [BLOCK_N, BLOCK_D]
        is_read = keep_row[:, None] & keep_key[None, :]  # [BLOCK_M, BLOCK_N]
        if READS_PAIRS:  # see `attention_forward`
            rows, keys = row[:, None], offs_n[None, :]  # [BLOCK_M, 1], [1, BLOCK_N]
            of_pairs, of_distance = pair_terms(terms, extent, batch, head[:, None], rows, keys, shift, is_read)
        s = tl.dot(q_tile, k_tile.T, input_precision="ieee")  # [BLOCK_M, BLOCK_N]
        if terms.key_scale is not None:
            s *= tl.load(key_scale_ptr + offs_n.to(tl.int64) * terms.key_scale.s, mask=keep_key, other=0.0)[None, :]
        if terms.relative_scale is not None:
            s *= of_distance
        biases, of_product = None, factor
        if terms.key_bias is not None:
            bias_ptrs = key_bias_ptrs + (offs_n.to(tl.int64) * terms.key_bias.s)[None, :]
            biases = tl.load(bias_ptrs, mask=is_read, other=0.0) * LOG2_E  # [BLOCK_M, BLOCK_N]
        if HAS_PAIRS:
            biases = of_pairs if terms.key_bias is None else biases + of_pairs
        keep = keep_key[None, :] & (offs_n[None, :] < hi[:, None])  # [BLOCK_M, BLOCK_N]
        if left is not None:
            keep = keep & (offs_n[None, :] >= lo[:, None])
        if terms.bias_after_softcap is not None:
            cap = softcap if terms.query_scale_after_softcap is None else softcap[:, None]
            s, of_product = soft_cap(s * factor[:, None], cap), tl.full([BLOCK_M], 1.0, tl.float32)
        p, weighted, alpha, moved, m_i = probabilities(
            s, biases, keep, of_product, softcap, terms, m_i, True, results.entropy is not None
        )
        l_i, spread = moved_sums(p, weighted, alpha, moved, l_i, spread, results.entropy is not None)
        if pages is None:
            v_ptrs = v.ptr + (tl.cast(start_n, tl.int64) * v.s + v_offsets)  # [BLOCK_N, BLOCK_DV]
            v_tile = load_tile(v_ptrs, keep_key, VALUE_DIM, q_tile.dtype)  # [BLOCK_N, BLOCK_DV]
        else:
            v_ptrs = v.ptr + number * v.b + tile_offsets(slot, BLOCK_DV, v.s, v.d, WIDE)  # [BLOCK_N, BLOCK_DV]
            v_tile = load_tile(v_ptrs, is_held, VALUE_DIM, q_tile.dtype)  # [BLOCK_N, BLOCK_DV]
        acc *= alpha[:, None]
        acc = tl.dot(p.to(v_tile.dtype), v_tile, acc, input_precision="ieee")  # [BLOCK_M, BLOCK_DV]

    offsets = (batch * q_heads + kv_head * group) * q_len + packed + split.to(tl.int64) * part_rows  # [BLOCK_M]
    l_i, weight, total = finish_softmax(
        m_i, l_i, spread, factor, softcap, terms, sinks, batch, head, row, results, offsets, keep_row
    )
    out = (acc * (weight / total)[:, None]).to(results.out.dtype.element_ty)  # [BLOCK_M, BLOCK_DV]
    offs_value = tl.arange(0, BLOCK_DV)
    written = keep_row & (tl.where(splits == 1, 1.0, l_i) > 0.0)
    keep_out = written[:, None] & (offs_value[None, :] < VALUE_DIM)
    tl.store(results.out + offsets[:, None] * VALUE_DIM + offs_value[None, :], out, mask=keep_out)


KERNELS["decode"] = attention_decode


def decode(call: AttentionCall, aux: bool) -> ForwardResult:
    """out and lse, with aux also max_logit and entropy, by the decode kernel and the combination of its splits.

    The rows of a call stand at the end of its keys: those of a cache, and where they `are_few_rows`.
    """
    sizes, visible = sizes_of(call), call.visibility
    rows = padded_dim(sizes.q_heads // sizes.kv_heads * sizes.q_len)
    asked = {"aux": aux, "packed_rows": rows, "sequences": visible.row_counts is not None}
    asked |= {"right": False, "key_lengths": False}  # no code depends on how the end of a cache is given
    ready = Prepared(call, specialisation_of(call, sizes, asked), sizes, _arguments(call))
    shape, dtype = call.q.shape[:3], torch.float32 if call.k.dtype == EIGHT_BIT else call.q.dtype
    out = call.q.new_empty((*shape, call.v.shape[3]), dtype=dtype)
    lse = call.q.new_empty(shape, dtype=torch.float32)
    max_logit, entropy = (torch.empty_like(lse), torch.empty_like(lse)) if aux else (None, None)
    results = Results(out, None, lse, max_logit, entropy)
    launch_kernel("decode", ready, {"results": results}, over_groups, launch_in_splits)
    return ForwardResult(out, lse, max_logit, entropy)


def _arguments(call: AttentionCall) -> Arguments:
    visible, capacity = call.visibility, call.visibility.k_len
    lengths, ranges, new = visible.key_lengths, visible.key_ranges, visible.row_counts
    if lengths is not None and lengths.dtype not in (torch.int32, torch.int64):
        lengths = bounded(lengths, capacity)
    return {
        **operand_arguments(call),
        "key_lengths": None if lengths is None else lengths.contiguous().view(torch.int32),
        "key_ranges": None if ranges is None else bounded(ranges, capacity).contiguous(),
        "query_lengths": None if new is None else new.int().contiguous(),
        "left": None if visible.left is None else min(visible.left, capacity),
        "capacity": capacity,
        "length_words": 1 if lengths is None else lengths.dtype.itemsize // 4,
    }
