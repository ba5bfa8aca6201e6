"""Forward kernel: output, log-sum-exp, largest logit and entropy of a block of query rows."""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

from .addresses import begin_scale, contiguous_tile, in_vectors, load_factors, place_of_member, tile_at
from .primitives import (
    LENGTHS,
    LN_2,
    LOG2_E,
    TINY,
    dropout_keeps,
    joint_peak,
    load_signed,
    lost_in_rounding,
    partial_sums,
    program_in_section,
    scale_add_bias,
    scale_rows_add,
    soft_cap,
    store_tile,
)
from .records import Dropout, Keys, Sight, View
from .walk import rows_of_block, visible_tile, walk_keys


class Softmax(NamedTuple):
    """State of rows from block to block: accumulator [M, Dv], the rest as `online_softmax` returns it."""

    accumulator: Any
    running_max: Any
    running_sum: Any
    running_spread: Any


class RowFactors(NamedTuple):
    """Rows' terms of a step: their factor [M], softcap or None, and `Dropout`."""

    factor: Any
    softcap: Any
    dropout: Dropout


@triton.jit
def online_softmax(
    logits,
    bias,
    keep,
    factor,
    softcap,
    state,
    MASKED: tl.constexpr,
    ENTROPY: tl.constexpr,
):
    """One step: (probabilities, decay, running_max, running_sum, running_spread), all relative to the new maximum.

    logits [BLOCK_M, BLOCK_N] without factor >= 0; bias, in base 2, broadcasts to them or is None; keep says which are
    visible where MASKED. The running maximum is that of the uncapped logits; the capped one, the shift, is subtracted.
    Spread is sum_j exp(z_j - shift) (z_j - shift). Sum and spread are `partial_sums`, [BLOCK_M, columns].
    """
    running_max, running_sum, running_spread = state.running_max, state.running_sum, state.running_spread
    COLUMNS: tl.constexpr = running_sum.shape[1]
    if bias is not None:
        logits = scale_add_bias(logits, factor[:, None], bias)
        factor = tl.full(factor.shape, 1.0, tl.float32)
    if MASKED:
        logits = tl.where(keep, logits, float("-inf"))
    block_max = tl.maximum(running_max, tl.max(logits, 1) * factor)
    if softcap is None:
        previous, shift = running_max, block_max
        if MASKED or bias is not None:
            shift = tl.where(block_max == float("-inf"), 0.0, block_max)
        exponent = scale_rows_add(logits, factor, -shift)
    else:
        previous, shift = soft_cap(running_max, softcap), soft_cap(block_max, softcap)
        exponent = soft_cap(logits * factor[:, None], softcap) - shift[:, None]
        if MASKED:
            exponent = tl.where(keep, exponent, float("-inf"))
        if bias is not None:
            exponent = tl.where(bias == float("-inf"), float("-inf"), exponent)
    probabilities = tl.exp2(exponent)
    decay = tl.exp2(previous - shift)
    decays = tl.broadcast_to(decay[:, None], running_sum.shape)
    if ENTROPY:
        if bias is not None:
            exponent = tl.where(exponent == float("-inf"), 0.0, exponent)
        elif MASKED:
            exponent = tl.where(keep, exponent, 0.0)
        moved = tl.where(running_sum > 0.0, (previous - shift)[:, None], 0.0)
        moved = tl.fma(moved, running_sum, running_spread)
        running_spread = tl.fma(moved, decays, partial_sums(probabilities * exponent, COLUMNS))
    running_sum = tl.fma(running_sum, decays, partial_sums(probabilities, COLUMNS))
    return probabilities, decay, block_max, running_sum, running_spread


@triton.jit
def softmax_results(state, factor, softcap):
    """(row_sum, shift in base 2, lse, max_logit, entropy) of rows; 0, 0, -inf, -inf, 0 for a row without keys."""
    running_max, row_sum, row_spread = state.running_max, tl.sum(state.running_sum, 1), tl.sum(state.running_spread, 1)
    empty = row_sum == 0.0
    total = tl.where(empty, 1.0, row_sum)
    shift = running_max
    if softcap is not None:
        shift = soft_cap(running_max, softcap)
    shift = tl.where(empty, 0.0, shift)
    lse = tl.where(empty, float("-inf"), (shift + tl.log2(total)) * LN_2)
    entropy = tl.where(empty, 0.0, (tl.log2(total) - row_spread / total) * LN_2)
    max_logit = tl.where((factor == TINY) & (row_sum > 0.0), 0.0, running_max * LN_2)  # TINY stands for 0
    max_logit = tl.where(row_sum == row_sum, max_logit, row_sum)  # tl.max ignores NaN; the sum keeps it
    return row_sum, shift, lse, max_logit, tl.where(entropy < 0.0, 0.0, entropy)


@triton.jit
def store_statistics(results, offsets, lse, max_logit, entropy, keep):
    """Store the members of `Results` that are fp32, where it has them."""
    tl.store(results.lse + offsets, lse, mask=keep)
    if results.max_logit is not None:
        tl.store(results.max_logit + offsets, max_logit, mask=keep)
    if results.entropy is not None:
        tl.store(results.entropy + offsets, entropy, mask=keep)


@triton.jit
def softmax_total(row_sum, shift, sinks_ptr, head):
    """(weight, total): the output is weight * accumulator / total; a sink joins the total only.

    -inf is no sink, +inf gives weight 0, and NaN a total of NaN. A row without keys, whose sum is 0, has a total of 1.
    """
    if sinks_ptr is None:
        weight = 1.0
        total = row_sum
    else:
        sink = tl.load(sinks_ptr + head) * LOG2_E
        _, weight, of_sink = joint_peak(shift, sink)
        total = tl.fma(row_sum, weight, of_sink)
    return weight, tl.where(row_sum == 0.0, 1.0, total)


@triton.jit
def _attend(
    state,
    block,
    key_scale,
    key_bias,
    terms,
    sight,
    SUMS: tl.constexpr,
    MASKED: tl.constexpr,
):
    """A step of `walk_keys`: online softmax. SUMS: 1 with the entropy's."""
    keep = None
    if MASKED:
        keep = visible_tile(sight, block.offs)
    bias = None
    if key_bias is not None:
        bias = key_bias[None, :]
    probabilities, decay, running_max, running_sum, running_spread = online_softmax(
        block.logits, bias, keep, terms.factor, terms.softcap, state, MASKED, SUMS == 1
    )
    dropout = terms.dropout
    if dropout.state is not None:
        kept = dropout_keeps(dropout, dropout.rows[:, None], (dropout.first_key + block.offs)[None, :])
        probabilities = tl.where(kept, probabilities, 0.0)
    accumulator = state.accumulator * decay[:, None]
    accumulator = tl.dot(probabilities.to(block.v.dtype), block.v, accumulator, input_precision="ieee")
    return Softmax(accumulator, running_max, running_sum, running_spread)


@triton.jit(do_not_specialize=[*LENGTHS, "group"])
def attention_forward(
    k_descriptor,  # first: behind other parameters, descriptors cost 14 address instructions a step (sm_100)
    v_descriptor,
    q,
    k,
    v,
    query_scale,
    key_scale,
    key_bias,
    ranges,
    starts,
    pages,
    mask,
    seen_ptr,
    results,
    logit_terms,
    keep_from,
    dropout,
    left,
    right,
    q_len,
    k_len,
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
    INVARIANT: tl.constexpr,
    LANES: tl.constexpr,
):
    """Attention output and statistics of the softmax for BLOCK_M query rows of one (batch or sequence, head).

        x[i, j]      = scale * (q[i] . k[j]) * query_scale[i] * key_scale[j] + key_bias[j]      j visible to i
        z[i, j]      = softcap * tanh(x[i, j] / softcap), or x[i, j] without softcap
        lse[i]       = ln sum_j exp(z[i, j])
        max_logit[i] = max_j x[i, j]
        entropy[i]   = lse[i] - sum_j exp(z[i, j] - lse[i]) * z[i, j]
        out[i]       = sum_j keep[i, j] * keep_scale * exp(z[i, j]) * v[j] / (exp(lse[i]) + exp(sinks[head]))

    Grid: (heads of a section, blocks of the longest Sq, sections), see `program_in_section`; each program writes its
    rows of the results, all of them, once.

    q, k, v          `Strided` [B, Hq, Sq, D], [B, Hkv, Sk, D], [B, Hkv, Sk, Dv] of fp16, bf16 or fp32; group = Hq/Hkv
    pages            `Pages` of the members or None; then k, v are [N, Hkv, page, D or Dv], and what else has keys is
                     as without
    *_descriptor     tensor descriptors of k and v with blocks [1, 1, BLOCK_N, BLOCK_D or BLOCK_DV], or None
    query_scale      fp32 [B, Hq, Sq] or None = 1, any sign; key_scale fp32 [B, Hkv, Sk] or None = 1; both `Scale`
    key_bias         `Bias` fp32 [B, Hkv, group, Sk] or None = 0; exp(z) is 0 where it is -inf
    logit_terms      `LogitTerms`
    ranges, starts   `Ranges`; `Starts` of a packed batch or None; left, right: `walk.row_range`
    mask             `Strided` uint8 [B, Hq, Sq, Sk], strides 0 on broadcast axes, or None
    seen             uint8 (int16 where INVARIANT) [B, Hkv, Sk] contiguous or None: keys that some row sees; the rest is
                     never multiplied
    dropout          `DropoutState`, its state None = no dropout
    results          `Results`, lse in natural log; rounding is what out lost when it was rounded: `lost_in_rounding`
    BLOCK_D, BLOCK_DV  powers of two >= 16 that hold HEAD_DIM and VALUE_DIM
    INVARIANT        take all blocks of keys in ascending order, in steps of one width: a row's bits then do not depend
                     on the blocks that other rows look at, nor on the position of its tile

    Products accumulate in fp32; the scales act in fp32 on the accumulated product; the sign of a row's factor is folded
    into its q, which is exact. P is rounded to v's dtype before P @ V. A row without keys gives out 0, lse -inf.
    Online softmax: Milakov & Gimelshein 2018, arXiv:1805.02867; blocking: Dao 2023, arXiv:2307.08691, Algorithm 1.
    """
    block, head, member = program_in_section(q_heads, first_y, first_z, right is not None, LANES)
    q, k, v = in_vectors(q, ALIGNED), in_vectors(k, ALIGNED), in_vectors(v, ALIGNED)
    packed_len = q_len
    place, q_len, k_len = place_of_member(member, head, head // group, q_heads, group, q_len, k_len, starts)
    first_row = block * BLOCK_M
    if starts is not None:
        if first_row >= q_len:
            return
    batch = place.batch
    view = View(q_len, k_len, left, right, ranges.key_lengths, ranges.key_ranges)
    rows = rows_of_block(first_row, batch, view, BLOCK_M)
    memory_row = (place.first_row + first_row).to(tl.int64)

    factor = tl.full([BLOCK_M], 1.0, tl.float32) * (logit_terms.scale * LOG2_E)
    if query_scale is not None:
        factor *= load_factors(begin_scale(query_scale, batch, head, memory_row), rows.keep)
    row_base = (batch.to(tl.int64) * q_heads + head.to(tl.int64)) * packed_len + memory_row
    q_ptrs = tile_at(q, batch, head, memory_row, BLOCK_M, BLOCK_D, WIDE)
    scratch_ptrs = contiguous_tile(results.out, row_base, BLOCK_M, BLOCK_D, VALUE_DIM)
    q_tile = load_signed(q_ptrs, scratch_ptrs, factor, rows.keep, HEAD_DIM, VALUE_DIM)
    factor = tl.abs(factor)
    if key_bias is None:
        factor = tl.where(factor == 0.0, TINY, factor)

    batch_head, packed_rows = batch * q_heads + head, place.first_row + rows.offs
    dropped = Dropout(dropout.state, keep_from, dropout.keep_scale, batch_head, packed_rows, place.first_key)
    terms = RowFactors(factor, logit_terms.softcap, dropped)

    running_sum = tl.zeros([BLOCK_M, SUM_COLUMNS], tl.float32)
    running_max = tl.full([BLOCK_M], float("-inf"), tl.float32)
    state = Softmax(tl.zeros([BLOCK_M, BLOCK_DV], tl.float32), running_max, running_sum, running_sum)
    keys = Keys(k, v, k_descriptor, v_descriptor, key_scale, key_bias, seen_ptr, pages)
    sight = Sight(place, rows, view, mask)
    SUMS: tl.constexpr = 0 if results.entropy is None else 1
    state, _ = walk_keys(
        state, _attend, terms, q_tile, keys, sight, HEAD_DIM, VALUE_DIM, BLOCK_DV, BLOCK_N, WIDE, SUMS, INVARIANT
    )

    row_sum, shift, lse, max_logit, entropy = softmax_results(state, factor, logit_terms.softcap)
    weight, total = softmax_total(row_sum, shift, logit_terms.sinks, head)
    out = state.accumulator / total[:, None]
    if logit_terms.sinks is not None:
        out *= weight[:, None]
    if dropout.state is not None:
        out *= dropout.keep_scale
    store_tile(contiguous_tile(results.out, row_base, BLOCK_M, BLOCK_DV, VALUE_DIM), out, rows.keep, VALUE_DIM)
    if results.rounding is not None:
        lost = lost_in_rounding(out, out.to(results.out.dtype.element_ty))
        rounding_ptrs = contiguous_tile(results.rounding, row_base, BLOCK_M, BLOCK_DV, VALUE_DIM)
        store_tile(rounding_ptrs, lost, rows.keep, VALUE_DIM)
    store_statistics(results, row_base + tl.arange(0, BLOCK_M), lse, max_logit, entropy, rows.keep)
