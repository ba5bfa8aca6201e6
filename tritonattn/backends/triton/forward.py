"""Forward kernel: output, log-sum-exp, largest logit and entropy of a block of query rows."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...core.call import AttentionCall, ForwardResult
from ...core.eight_bit import EIGHT_BIT
from .attention import launch_in_splits, launch_kernel, new_results, prepared
from .block import (
    LENGTHS,
    from_row,
    load_tile,
    page_slots,
    program_in_section,
    sequence_bounds,
    tile_offsets,
    vector_from,
)
from .grids import over_rows
from .launch import KERNELS
from .pairs import UNMASKED, dropout_keeps, key_bounds, key_range, pair_terms, pass_bounds, visible, whole_blocks
from .records import Results, View
from .softmax import (
    LOG2_E,
    TINY,
    finish_softmax,
    lost_in_rounding,
    moved_sums,
    probabilities,
    soft_cap,
    softcap_of_rows,
)


@triton.jit(do_not_specialize=[*LENGTHS, "group"])
def attention_forward(
    k_descriptor,  # first: behind other parameters, descriptors cost 3 to 5 % of a loop (sm_100; static, triton 3.9)
    v_descriptor,
    q,
    k,
    v,
    terms,
    extent,
    relative_right,
    masks,
    pages,
    results,
    scale,
    softcap,
    sinks,
    keep_from,
    dropout_ptr,
    keep_scale,
    left,
    right,
    q_len,
    k_len,
    splits,
    part_rows,
    q_heads,
    group,
    first_head,
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
    INVARIANT: tl.constexpr,
    NUM_XCDS: tl.constexpr,
    WARP_SPECIALIZE: tl.constexpr,
):
    """Attention output and statistics of the softmax for BLOCK_M query rows of one (batch or sequence, head).

        b[i, j]      = key_bias[j] + bias[i, j] + relative_bias[i, i + Sk - Sq - j + relative_right]
        r[i, j]      = relative_scale[i, i + Sk - Sq - j + relative_right]
        x[i, j]      = scale * (q[i] . k[j]) * query_scale[i] * key_scale[j] * r[i, j] + b[i, j]     j visible to i
        z[i, j]      = softcap * tanh(x[i, j] / softcap), or x[i, j] without softcap
        lse[i]       = ln sum_j exp(z[i, j])
        max_logit[i] = max_j x[i, j]
        entropy[i]   = lse[i] - sum_j exp(z[i, j] - lse[i]) * z[i, j]
        out[i]       = sum_j keep[i, j] * keep_scale * exp(z[i, j]) * v[j] / (exp(lse[i]) + exp(sinks[i]))

    Grid: (size of a section, blocks of the longest Sq times splits, sections), see `program_in_section`; each program
    writes its rows of the results, all of them, once.

    q, k, v          `Strided` [B, Hq, Sq, D], [B, Hkv, Sk, D], [B, Hkv, Sk, Dv] of fp16, bf16 or fp32; group = Hq/Hkv
                     of 8 bits, k and v are converted to q's dtype as they are loaded
    pages            `Pages` of the sequences or None; k and v are then [N, Hkv, page, D or Dv], others as without
    *_descriptor     tensor descriptors of k and v with blocks [1, 1, BLOCK_N, BLOCK_D or BLOCK_DV], or None
    terms            `LogitTerms`: query_scale [B, Hq, Sq] or None = 1, any sign, key_scale [B, Hkv, Sk] or None = 1 and
                     key_bias [B, Hkv, group, Sk] or None = 0, exp(z) is 0 where it is -inf, in fp32; others of
                     `pair_terms`. With bias_after_softcap x has no b, z = softcap * tanh(x / softcap) + b, and
                     max_logit is the maximum of z
    sinks            fp32 `Scale` [B, Hq, Sq] or None
    HAS_BIAS         one of the three biases is given
    masks            `Masks`; left, right of `key_range`, or None
    dropout          of `dropout_keeps`, or None
    results          `Results`, lse in natural log; rounding is what out lost when it was rounded: `lost_in_rounding`
    splits           None, or the number of programs that share the keys of a row: the results, without rounding and in
                     fp32, are then parts for `combine_splits`, each of part_rows = B * Hq * Sq rows
    BLOCK_D, BLOCK_DV  powers of two >= 16 that hold HEAD_DIM and VALUE_DIM
    INVARIANT        blocks of keys come in ascending order, in steps of one width: a row's bits then do not depend on
                     the blocks that other rows need, nor on the position of its tile

    Products accumulate in fp32; the scales act in fp32 on the accumulated product; the sign of a row's factor is folded
    into its q, which is exact. P is rounded to v's dtype before P @ V. A row without keys gives out 0, lse -inf.
    Online softmax: Milakov & Gimelshein 2018, arXiv:1805.02867; blocking: Dao 2023, arXiv:2307.08691, Algorithm 1.
    """
    block, head, sequence = program_in_section(q_heads, first_head, first_y, first_z, right is not None, NUM_XCDS)
    if sequence < 0:
        return
    if splits is not None:
        split, block = block % splits, block // splits
    packed_len, kv_head = q_len, head // group
    batch, first_row, first_key, q_len, k_len = sequence_bounds(sequence, q_len, k_len, masks.q_starts, masks.k_starts)
    start_m = block * BLOCK_M
    if masks.q_starts is not None:
        if start_m >= q_len:
            return
    view = View(q_len, k_len, left, right, masks.key_lengths, masks.key_ranges)
    block_rows = tl.arange(0, BLOCK_M)
    keep_row = start_m + block_rows < q_len  # [BLOCK_M]
    offs_m = tl.minimum(start_m + block_rows, q_len - 1)  # [BLOCK_M]
    lo, hi = key_range(offs_m, batch, view)  # [BLOCK_M]
    memory_row = (first_row + start_m).to(tl.int64)
    row_base = (batch.to(tl.int64) * q_heads + head.to(tl.int64)) * packed_len + memory_row
    if splits is not None:
        row_base += split.to(tl.int64) * part_rows

    factor = tl.full([BLOCK_M], 1.0, tl.float32) * (scale * LOG2_E)  # [BLOCK_M]
    if terms.query_scale is not None:
        scale_ptrs = vector_from(terms.query_scale, batch, head, 0, memory_row + block_rows)
        factor *= tl.load(scale_ptrs, mask=keep_row, other=0.0)
    q = from_row(q, batch, head, memory_row, ALIGNED)
    q_ptrs = q.ptr + tile_offsets(block_rows, BLOCK_D, q.s, q.d, WIDE)  # [BLOCK_M, BLOCK_D]
    if VALUE_DIM >= HEAD_DIM:
        # A changed sign goes through memory, this program's rows of out. From registers, the loop has 12 % more
        # instructions on sm_80 at D 128, and spills 20 bytes (static, triton 3.9).
        BITS: tl.constexpr = q.ptr.dtype.element_ty.primitive_bitwidth
        PITCH: tl.constexpr = VALUE_DIM * results.out.dtype.element_ty.primitive_bitwidth // BITS
        scratch = results.out.to(q.ptr.dtype) + row_base * PITCH
        scratch_ptrs = scratch + tile_offsets(block_rows, BLOCK_D, PITCH, 1, False)  # [BLOCK_M, BLOCK_D]
        if tl.min(factor, 0) < 0.0:
            flipped = load_tile(q_ptrs, keep_row, HEAD_DIM)  # [BLOCK_M, BLOCK_D]
            flipped = tl.where((factor < 0)[:, None], -flipped, flipped)
            keep_q = keep_row[:, None] & (tl.arange(0, BLOCK_D)[None, :] < HEAD_DIM)
            tl.store(scratch_ptrs, flipped, mask=keep_q)
            tl.debug_barrier()
            q_ptrs = scratch_ptrs
        q_tile = load_tile(q_ptrs, keep_row, HEAD_DIM)  # [BLOCK_M, BLOCK_D]
    else:
        q_tile = load_tile(q_ptrs, keep_row, HEAD_DIM)  # [BLOCK_M, BLOCK_D]
        q_tile = tl.where((factor < 0)[:, None], -q_tile, q_tile)
    factor = tl.abs(factor)
    if terms.query_scale_after_softcap is not None:
        softcap = softcap_of_rows(softcap, factor, scale)  # [BLOCK_M]
    if not HAS_BIAS:
        factor = tl.where(factor == 0.0, TINY, factor)

    k_batch, k_first = batch, first_key
    if pages is not None:
        k_batch, k_first = batch * 0, first_key * 0  # pages are numbered through
    k, v = from_row(k, k_batch, kv_head, k_first, ALIGNED), from_row(v, k_batch, kv_head, k_first, ALIGNED)
    if masks.seen is not None:
        seen_ptr = masks.seen + (batch.to(tl.int64) * (q_heads // group) + kv_head) * k_len
    if terms.key_scale is not None:
        key_scale_ptr = vector_from(terms.key_scale, batch, kv_head, 0, first_key)
    if terms.key_bias is not None:
        key_bias_ptr = vector_from(terms.key_bias, batch, kv_head, head % group, first_key)
    kv_start, kv_end, full_start, full_end = key_bounds(
        start_m, tl.minimum(start_m + BLOCK_M, q_len) - 1, lo, hi, batch, view, BLOCK_N, masks.mask is not None
    )
    if splits is not None:
        first_block = kv_start // BLOCK_N
        share = tl.cdiv(tl.maximum(tl.cdiv(kv_end, BLOCK_N) - first_block, 0), splits)
        begin, end = (first_block + split * share) * BLOCK_N, (first_block + (split + 1) * share) * BLOCK_N
        kv_start, kv_end = tl.maximum(kv_start, begin), tl.minimum(kv_end, end)
        full_lo, full_hi = tl.maximum(full_start, begin), tl.minimum(full_end, end)
        full_start, full_end = whole_blocks(kv_start, full_lo, full_hi, BLOCK_N, False)

    HAS_PAIRS: tl.constexpr = terms.bias is not None or terms.relative_bias is not None
    READS_PAIRS: tl.constexpr = HAS_PAIRS or terms.relative_scale is not None
    shift = k_len - q_len + first_key - first_row  # of `pair_terms`
    if relative_right is not None:
        shift += relative_right
    rows = (first_row + offs_m)[:, None]  # [BLOCK_M, 1], in the packed axis
    acc = tl.zeros([BLOCK_M, BLOCK_DV], tl.float32)  # [BLOCK_M, BLOCK_DV]
    m_i = tl.full([BLOCK_M], float("-inf"), tl.float32)  # [BLOCK_M]
    l_i = tl.zeros([BLOCK_M, SUM_COLUMNS], tl.float32)  # [BLOCK_M, SUM_COLUMNS]
    spread = l_i  # for the entropy: sum_j exp(z - shift) * (z - shift)
    FIRST: tl.constexpr = 1 if INVARIANT and left is None and masks.key_ranges is None else 0
    # Masks hold registers: masked steps of a whole block spill 244 bytes on sm_90 at D 64, 212 at D 512, 8 on sm_80 at
    # D 128, and 388 in `attention_grad_key_value` on sm_90 at D 128 (static, triton 3.9).
    HALVED: tl.constexpr = BLOCK_N >= (32 if BLOCK_M >= 64 and BLOCK_DV > 256 else 64) and not INVARIANT
    MASKED_N: tl.constexpr = BLOCK_N // 2 if HALVED else BLOCK_N
    for PASS in tl.static_range(FIRST, 3 if INVARIANT else 2):
        if PASS != UNMASKED or masks.mask is None:
            step = tl.arange(0, BLOCK_N if PASS == UNMASKED else MASKED_N)  # [N]
            n_lo, n_hi, loop_start, loop_end, gap_start, gap = pass_bounds(
                kv_start, kv_end, full_start, full_end, step.shape[0], PASS, INVARIANT
            )
            k_offsets = tile_offsets(step, BLOCK_D, k.s, k.d, WIDE)  # [N, BLOCK_D]
            v_offsets = tile_offsets(step, BLOCK_DV, v.s, v.d, WIDE)  # [N, BLOCK_DV]
            for position in tl.range(
                loop_start, loop_end, step.shape[0], warp_specialize=WARP_SPECIALIZE and PASS == UNMASKED
            ):
                start_n = position
                if PASS != UNMASKED:
                    start_n = tl.where(position >= gap_start, position + gap, position)
                start_n = tl.multiple_of(start_n, step.shape[0])
                offs_n = start_n + step  # [N]
                keys = (first_key + offs_n)[None, :]  # [1, N], in the packed axis
                load_key = tl.full(step.shape, 1, tl.int1)  # [N]
                if PASS != UNMASKED:
                    load_key = (offs_n >= n_lo) & (offs_n < n_hi)
                    if masks.seen is not None:
                        load_key = load_key & (tl.load(seen_ptr + offs_n, mask=load_key, other=0) != 0)
                if READS_PAIRS:  # loaded before the product, lest the softmax take the layout of the loads
                    is_read = load_key[None, :]  # [1, N]
                    of_pairs, of_distance = pair_terms(terms, extent, batch, head, rows, keys, shift, is_read)
                if pages is not None:
                    number, slot, is_held = page_slots(pages, sequence, offs_n, load_key)
                    number = number.to(tl.int64)[:, None]  # [N, 1]
                    k_ptrs = k.ptr + number * k.b + tile_offsets(slot, BLOCK_D, k.s, k.d, WIDE)  # [N, BLOCK_D]
                    v_ptrs = v.ptr + number * v.b + tile_offsets(slot, BLOCK_DV, v.s, v.d, WIDE)  # [N, BLOCK_DV]
                    k_tile = load_tile(k_ptrs, is_held, HEAD_DIM, q_tile.dtype)  # [N, BLOCK_D]
                    v_tile = load_tile(v_ptrs, is_held, VALUE_DIM, q_tile.dtype)  # [N, BLOCK_DV]
                elif PASS != UNMASKED or k_descriptor is None:
                    k_ptrs = k.ptr + start_n.to(tl.int64) * k.s + k_offsets  # [N, BLOCK_D]
                    k_tile = load_tile(k_ptrs, load_key, HEAD_DIM, q_tile.dtype)  # [N, BLOCK_D]
                    v_ptrs = v.ptr + start_n.to(tl.int64) * v.s + v_offsets  # [N, BLOCK_DV]
                    v_tile = load_tile(v_ptrs, load_key, VALUE_DIM, q_tile.dtype)  # [N, BLOCK_DV]
                else:
                    k_tile = k_descriptor.load([batch, kv_head, first_key + start_n, 0]).reshape(k_offsets.shape)
                    v_tile = v_descriptor.load([batch, kv_head, first_key + start_n, 0]).reshape(v_offsets.shape)
                s = tl.dot(q_tile, k_tile.T, input_precision="ieee")  # [BLOCK_M, N]
                if terms.key_scale is not None:
                    s *= tl.load(key_scale_ptr + offs_n.to(tl.int64) * terms.key_scale.s, mask=load_key, other=0.0)[
                        None, :
                    ]
                if terms.relative_scale is not None:
                    s *= of_distance
                biases, keep, of_product = None, None, factor
                if terms.key_bias is not None:
                    bias_ptrs = key_bias_ptr + offs_n.to(tl.int64) * terms.key_bias.s
                    biases = (tl.load(bias_ptrs, mask=load_key, other=0.0) * LOG2_E)[None, :]  # [1, N]
                if HAS_PAIRS:
                    biases = of_pairs if terms.key_bias is None else biases + of_pairs  # [BLOCK_M, N]
                if terms.bias_after_softcap is not None:
                    cap = softcap if terms.query_scale_after_softcap is None else softcap[:, None]
                    s, of_product = soft_cap(s * factor[:, None], cap), tl.full([BLOCK_M], 1.0, tl.float32)
                if PASS != UNMASKED:
                    keep = visible(offs_m, offs_n, lo, hi, batch, head, view, masks.mask)  # [BLOCK_M, N]
                p, weighted, alpha, moved, m_i = probabilities(
                    s, biases, keep, of_product, softcap, terms, m_i, PASS != UNMASKED, results.entropy is not None
                )
                l_i, spread = moved_sums(p, weighted, alpha, moved, l_i, spread, results.entropy is not None)
                if dropout_ptr is not None:
                    batch_head, first = batch * q_heads + head, first_key + start_n
                    kept = dropout_keeps(dropout_ptr, keep_from, batch_head, rows, first, step.shape[0])
                    p = tl.where(kept, p, 0.0)
                acc *= alpha[:, None]
                acc = tl.dot(p.to(v_tile.dtype), v_tile, acc, input_precision="ieee")  # [BLOCK_M, BLOCK_DV]

    memory_rows, at = memory_row + block_rows, row_base + block_rows
    l_i, weight, total = finish_softmax(
        m_i, l_i, spread, factor, softcap, terms, sinks, batch, head, memory_rows, results, at, keep_row
    )
    out = acc / total[:, None]  # [BLOCK_M, BLOCK_DV]
    if sinks is not None:
        out *= weight[:, None]
    if dropout_ptr is not None:
        out *= keep_scale
    out_offsets = tile_offsets(block_rows, BLOCK_DV, VALUE_DIM, 1, False)  # [BLOCK_M, BLOCK_DV]
    keep_out = keep_row[:, None] & (tl.arange(0, BLOCK_DV)[None, :] < VALUE_DIM)
    rounded = out.to(results.out.dtype.element_ty)
    tl.store(results.out + row_base * VALUE_DIM + out_offsets, rounded, mask=keep_out)
    if results.rounding is not None:
        lost = lost_in_rounding(out, rounded)
        tl.store(results.rounding + row_base * VALUE_DIM + out_offsets, lost, mask=keep_out)


KERNELS["forward"] = attention_forward


def forward(call: AttentionCall, aux: bool, rounding: Tensor | None = None) -> ForwardResult:
    """out and lse, and with aux max_logit and entropy, by the forward kernel.

    rounding   int8 [B, Hq, Sq, Dv], contiguous, or None; receives what out lost when it was rounded: `core.rounding`
    """
    ready = prepared(call, aux=aux, rounding=rounding is not None)
    call, q, v = ready.call, ready.call.q, ready.call.v
    row, dtype = q.select(3, 0), torch.float32 if v.dtype == EIGHT_BIT else q.dtype
    like = q if v.shape[3] == q.shape[3] else row[..., None].expand(-1, -1, -1, v.shape[3])
    out = new_results(call, like, dtype)
    lse = new_results(call, row, fill=-torch.inf)
    max_logit = new_results(call, row, fill=-torch.inf) if aux else None
    entropy = new_results(call, row) if aux else None
    results = Results(out, rounding, lse, max_logit, entropy)
    launch_kernel("forward", ready, {"results": results}, over_rows, launch_in_splits)
    return ForwardResult(out, lse, max_logit, entropy)
