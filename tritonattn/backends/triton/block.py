"""Device functions that attention kernels share: addresses, tiles, masks, the softmax's step, dropout.

Names: `offs_*` are vectors of indices, `*_ptr` pointers, CAPITALS constexprs. Logits are in base 2 inside a kernel:
exp(x) = exp2(x * log2(e)). Every multiply-add is an explicit fma, so that results do not depend on Triton's fp-fusion
default.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ...tuning import config
from .records import Strided

LOG2_E = tl.constexpr(1.4426950408889634)
LN_2 = tl.constexpr(0.6931471805599453)
# fp32's smallest normal number. It stands for a factor of 0 where a hidden logit is -inf, since -inf * 0 is NaN.
TINY = tl.constexpr(2.0**-126)
ROW_TERMS_ALIGNMENT = tl.constexpr(config.ROW_TERMS_ALIGNMENT)
UNMASKED = tl.constexpr(1)  # of `pass_bounds`: the pass over blocks that need no mask

# Arguments whose values change from call to call: compiled code does not depend on them.
LENGTHS = (
    "q_len k_len terms_len addends_len bounds_len capacity key_block q_heads kv_heads left right extent relative_right "
    "keep_from first_head first_y first_z splits part_rows"
).split()


# ---- Programs and addresses


@triton.jit
def program_position(first_y, first_z, LAST_FIRST: tl.constexpr):
    """(block, head, sequence) of this program, the three axes of its grid; LAST_FIRST: the last block comes first.

    first_y, first_z   where this launch begins: a grid past the hardware's limit takes several
    """
    block = tl.program_id(0)
    if LAST_FIRST:
        block = tl.num_programs(0) - 1 - block
    return block, first_y + tl.program_id(1), first_z + tl.program_id(2)


@triton.jit
def program_in_section(heads, first_head, first_y, first_z, LAST_FIRST: tl.constexpr, LANES: tl.constexpr):
    """(block, head, sequence) of this program of the grid (size of a section, blocks, sections): `tuning.order`.

    Programs start along the grid's first axis, then the second: all heads of a section take their longest block first,
    under a causal mask the last one. Sections cut the heads of all sequences, `heads` of each. Where they do not
    divide, the first section has fewer, and a program without a head gets the sequence -1.

    first_head   where the first section would begin if it were full, at most 0
    LANES        dies to which the hardware deals programs in turn, a divisor of the section's size. As many heads as
                 LANES divides stay on one die each, neighbours on the same; blocks of the others go to the dies in turn
    """
    size, lane, slot = tl.num_programs(0), tl.program_id(0) % LANES, tl.program_id(0) // LANES
    first, step = first_head + (first_z + tl.program_id(2)) * size, tl.program_id(1)
    count = tl.minimum(first + size, size)  # heads of the section
    of_lane, shared = count // LANES, count % LANES
    turn = (lane + step * shared) % LANES
    has_head = (slot < of_lane) | ((slot == of_lane) & (turn < shared))
    slot = tl.where(slot < of_lane, lane * of_lane + slot, LANES * of_lane + turn)
    block = step
    if LAST_FIRST:
        block = tl.num_programs(1) - 1 - step
    index = tl.maximum(first, 0) + slot
    return first_y + block, index % heads, tl.where(has_head, index // heads, -1)


@triton.jit
def sequence_bounds(sequence, q_len, k_len, q_starts, k_starts):
    """(batch entry, first row, first key, rows, keys) of a batch entry or packed sequence.

    Packed sequences follow one another in batch entry 0. q_starts and k_starts, int32 [N + 1] or None, are where their
    rows and keys begin, and the ends of the last one.
    """
    batch, first_row, first_key = sequence, sequence * 0, sequence * 0
    if q_starts is not None:
        first_row, first_key = tl.load(q_starts + sequence), tl.load(k_starts + sequence)
        q_len = tl.load(q_starts + sequence + 1) - first_row
        k_len = tl.load(k_starts + sequence + 1) - first_key
        batch = sequence * 0
    return batch, first_row, first_key, q_len, k_len


@triton.jit
def from_row(x, batch, head, row, ALIGNED: tl.constexpr):
    """`Strided` x from one (batch entry, head) and row on.

    ALIGNED: strides are multiples of 16 bytes. Triton itself finds multiples of 16 elements alone, and would load rows
    of 72 numbers of 16 bits one by one.
    """
    if ALIGNED:
        STEP: tl.constexpr = 128 // x.ptr.dtype.element_ty.primitive_bitwidth
        x = Strided(x.ptr, x.b // STEP * STEP, x.h // STEP * STEP, x.s // STEP * STEP, x.d)
    batch, head, row = tl.cast(batch, tl.int64), tl.cast(head, tl.int64), tl.cast(row, tl.int64)
    return Strided(x.ptr + (batch * x.b + head * x.h + row * x.s), x.b, x.h, x.s, x.d)


@triton.jit
def vector_from(x, batch, head, group_head, first):
    """Pointer to entry `first` of a `Scale` in one (batch entry, head, head of the group)."""
    batch, head, group_head = tl.cast(batch, tl.int64), tl.cast(head, tl.int64), tl.cast(group_head, tl.int64)
    return x.ptr + (batch * (x.b >> 4) + head * (x.h >> 4) + group_head * (x.g >> 4) + tl.cast(first, tl.int64) * x.s)


@triton.jit
def tile_offsets(offs_row, COLUMNS: tl.constexpr, row_stride, column_stride, WIDE: tl.constexpr):
    """Element offsets of the tile of rows offs_row from row 0; int64 where WIDE."""
    offs_column = tl.arange(0, COLUMNS)
    if WIDE:
        offs_row = offs_row.to(tl.int64)
        offs_column = offs_column.to(tl.int64)
    return offs_row[:, None] * row_stride + offs_column[None, :] * column_stride  # [ROWS, COLUMNS]


@triton.jit
def load_tile(pointers, keep_row, WIDTH: tl.constexpr):
    """A tile [ROWS, COLUMNS], 0 in rows that keep_row drops and in columns from WIDTH on."""
    COLUMNS: tl.constexpr = pointers.shape[1]
    keep = keep_row[:, None]
    if WIDTH < COLUMNS:
        keep = keep & (tl.arange(0, COLUMNS)[None, :] < WIDTH)
    return tl.load(pointers, mask=keep, other=0.0)


@triton.jit
def page_slots(pages, sequence, offs_n, keep):
    """(number, slot, is_held) of the keys that keep has: their page, their slot in it, and if they are in one.

    With b bits of size - 1, floor(j * (floor(2^(31 + b) / size) + 1) / 2^(31 + b)) is j // size for all j < 2^31
    (Granlund & Montgomery 1994, "Division by invariant integers using multiplication").
    """
    length, inverse = pages.length >> 4, (pages.inverse >> 4).to(tl.uint32)
    index = (tl.umulhi(offs_n.to(tl.uint32), inverse) >> (pages.shift >> 4)).to(tl.int32)
    is_listed = (index < length) & keep
    table = pages.table + tl.cast(sequence, tl.int64) * length
    number = tl.load(table + index, mask=is_listed, other=-1)
    return number, offs_n - index * (pages.size >> 4), (number >= 0) & (number < (pages.count >> 4))


# ---- Visible keys, and the blocks of a loop


@triton.jit
def key_range(row, batch, view):
    """The visible keys lo <= j < hi of a row or a vector of rows below q_len; lo >= hi is a row without keys.

    left, right      j >= row + k_len - q_len - left, j <= row + k_len - q_len + right
    key_lengths      int32 [B]: j < key_lengths[batch]
    key_ranges       int32 [B, Sq, 2], contiguous: key_ranges[batch, row, 0] <= j < key_ranges[batch, row, 1]
    """
    position = row + (view.k_len - view.q_len)
    lo = row * 0
    hi = lo + view.k_len
    if view.left is not None:
        lo = tl.maximum(position - view.left, 0)
    if view.right is not None:
        hi = tl.minimum(position + (view.right + 1), hi)
    if view.key_lengths is not None:
        hi = tl.minimum(hi, tl.load(view.key_lengths + batch))
    if view.key_ranges is not None:
        bounds = view.key_ranges + (batch.to(tl.int64) * view.q_len + row) * 2
        lo = tl.maximum(lo, tl.load(bounds))
        hi = tl.minimum(hi, tl.load(bounds + 1))
    return lo, hi


@triton.jit
def whole_blocks(start, full_lo, full_hi, BLOCK: tl.constexpr, MASKED: tl.constexpr):
    """(full_start, full_end), multiples of BLOCK between which no mask is needed, full_start <= full_end.

    start              of all visible pairs
    full_lo, full_hi   between them all pairs are visible; MASKED: nowhere
    """
    full_start = (full_lo + BLOCK - 1) // BLOCK * BLOCK
    full_end = tl.maximum(full_hi, 0) // BLOCK * BLOCK
    if MASKED:
        full_end = full_start
    if full_end <= full_start:
        full_start = start // BLOCK * BLOCK
        full_end = full_start
    return full_start, full_end


@triton.jit
def key_bounds(first, last, lo, hi, batch, view, BLOCK_N: tl.constexpr, MASKED: tl.constexpr):
    """(kv_start, kv_end, full_start, full_end) of the rows first .. last; vectors lo and hi are their key ranges.

    Keys outside [kv_start, kv_end) are hidden from all rows; full_start, full_end and MASKED as in `whole_blocks`.
    """
    if view.key_ranges is None:
        kv_start, full_hi = key_range(first, batch, view)
        full_lo, kv_end = key_range(last, batch, view)
    else:
        kv_start, kv_end = tl.min(tl.where(lo < hi, lo, view.k_len), 0), tl.max(tl.where(lo < hi, hi, 0), 0)
        full_lo, full_hi = tl.max(lo, 0), tl.min(hi, 0)
    full_start, full_end = whole_blocks(kv_start, full_lo, full_hi, BLOCK_N, MASKED)
    return kv_start, kv_end, full_start, full_end


@triton.jit
def pass_bounds(start, end, full_start, full_end, BLOCK: tl.constexpr, PASS: tl.constexpr, IN_ORDER: tl.constexpr):
    """(lo, hi, loop_start, loop_end, gap_start, gap) of a pass over the blocks that touch [start, end).

    lo, hi                 only [lo, hi) is loaded
    loop_start, loop_end   of the loop over the blocks of the pass, in steps of BLOCK
    gap_start, gap         a position from gap_start on stands for the block that begins `gap` later
    PASS                   1, UNMASKED: the blocks in [full_start, full_end). 0: the others, with that gap closed, or,
                           IN_ORDER, those before it. 2: those behind it
    """
    if PASS == 0 and IN_ORDER:
        end, full_end = tl.minimum(end, full_start), full_start
    if PASS == 2:
        start, full_start = tl.maximum(start, full_end), full_end
    loop_start, loop_end = full_start, full_end
    if PASS != UNMASKED:
        loop_start, loop_end = start // BLOCK * BLOCK, end - (full_end - full_start)
    return start, end, loop_start, loop_end, full_start, full_end - full_start


@triton.jit
def visible(offs_m, offs_n, lo, hi, batch, head, view, mask):
    """The visible pairs [BLOCK_M, BLOCK_N]: lo <= j < hi, and the dense mask, a `Strided` or None."""
    keep = offs_n[None, :] < hi[:, None]
    if view.left is not None or view.key_ranges is not None:
        keep = keep & (offs_n[None, :] >= lo[:, None])
    if mask is not None:
        inside = (offs_m < view.q_len)[:, None] & (offs_n < view.k_len)[None, :]
        offsets = offs_m.to(tl.int64)[:, None] * mask.s + offs_n.to(tl.int64)[None, :] * mask.d
        keep = keep & (tl.load(from_row(mask, batch, head, 0, False).ptr + offsets, mask=inside, other=0) != 0)
    return keep


@triton.jit
def pair_biases(bias, relative_bias, extent, batch, head, row, key, shift, keep):
    """The biases of the pairs that keep has, in base 2; 0 for others.

    bias            `Strided` [B, Hq, Sq, Sk] of fp16, bf16 or fp32, or None
    relative_bias   `Strided` [B, Hq, Sq, extent], likewise: the pair's entry is row - key + shift, and 0 outside of it
    row, key        a column and a row of the tile, or the reverse, of indices in the packed axes
    """
    if bias is not None:
        x = from_row(bias, batch, head, row, False)
        total = tl.load(x.ptr + key.to(tl.int64) * x.d, mask=keep, other=0.0).to(tl.float32)
    if relative_bias is not None:
        x, entry = from_row(relative_bias, batch, head, row, False), row + shift - key
        keep = keep & (entry.to(tl.uint32) < tl.cast(extent, tl.uint32))  # 0 <= entry < extent
        by_distance = tl.load(x.ptr + entry.to(tl.int64) * x.d, mask=keep, other=0.0).to(tl.float32)
        total = by_distance if bias is None else total + by_distance
    return total * LOG2_E


# ---- Arithmetic


@triton.jit
def partial_sums(x, COLUMNS: tl.constexpr):
    """Sums of x [M, N] as [M, COLUMNS], column c from every n = c modulo COLUMNS.

    mma.sync and wgmma leave two neighbours of every 8 columns in one lane: with 8 no lane needs another's sum. One
    column costs 5 % of the forward's loop and 7 % of grad_query's (sm_80; static, triton 3.9).
    """
    return tl.sum(x.reshape(x.shape[0], x.shape[1] // COLUMNS, COLUMNS), 1)


@triton.jit
def soft_cap(x, softcap):
    """softcap * tanh(x / softcap) for x in base 2 and softcap in natural units.

    tanh is exact to 2 ulp: below 0.6 an odd polynomial (tanh(x) / x by least squares on Chebyshev nodes), else by exp.
    """
    limit = softcap * LOG2_E
    x = x * (1.0 / limit)
    square = x * x
    series = tl.fma(square, -0.005883233156055212, 0.020785147324204445)
    series = tl.fma(series, square, -0.05378039926290512)
    series = tl.fma(series, square, 0.13331879675388336)
    series = tl.fma(series, square, -0.33333295583724976)
    small = tl.fma(x * square, series, x)
    magnitude = 1.0 - 2.0 / (tl.exp2(tl.abs(x) * (2.0 * LOG2_E)) + 1.0)
    return tl.where(tl.abs(x) < 0.6, small, tl.where(x < 0.0, -magnitude, magnitude)) * limit


@triton.jit
def soft_cap_slope(capped, softcap):
    """The derivative of `soft_cap` from its result."""
    ratio = capped * (1.0 / (softcap * LOG2_E))
    return tl.fma(-ratio, ratio, tl.full(capped.shape, 1.0, tl.float32))


@triton.jit
def dropout_keeps(dropout_ptr, keep_from, batch_head, rows, first, KEYS: tl.constexpr):
    """True for the pairs of rows and the KEYS keys from `first` on that dropout keeps, as `core.dropout` defines them.

    dropout_ptr   int64 [2]: seed and offset; a pair is kept where its word of Philox is at least keep_from
    batch_head    batch entry * Hq + head
    rows          [M, 1] for a result [M, KEYS], or [1, M] for one [KEYS, M]; rows and first in the packed axes
    first         a multiple of 4 behind the first key of the sequence: each call of Philox gives the words of 4 keys
    """
    groups = first + 4 * tl.arange(0, KEYS // 4)  # [KEYS // 4]
    groups = groups[None, :] if rows.shape[1] == 1 else groups[:, None]
    seed, offset = tl.load(dropout_ptr), tl.load(dropout_ptr + 1)
    zero = (rows + groups) * 0
    counter = zero + groups, zero + rows, zero + batch_head, zero + offset.to(tl.int32)
    w0, w1, w2, w3 = tl.philox(seed, counter[0], counter[1], counter[2], counter[3], 10)
    k0, k1, k2, k3 = is_kept(w0, keep_from), is_kept(w1, keep_from), is_kept(w2, keep_from), is_kept(w3, keep_from)
    IN_COLUMNS: tl.constexpr = rows.shape[1] == 1
    if KEYS < 32 or rows.shape[0] * rows.shape[1] < 32:  # Triton up to 3.8 joins wrong for products of 16: triton#10645
        bits = k0 | k1.to(tl.int32) << 1 | k2.to(tl.int32) << 2 | k3.to(tl.int32) << 3
        bit = 1 << tl.arange(0, 4)  # [4]
        if IN_COLUMNS:
            kept = bits[:, :, None] & bit[None, None, :]  # [M, KEYS // 4, 4]
        else:
            kept = bits[:, None, :] & bit[None, :, None]  # [KEYS // 4, 4, M]
        kept = kept != 0
    else:  # bits, since words would cost more to move
        kept = tl.join(tl.join(k0, k2), tl.join(k1, k3))  # [M, KEYS // 4, 2, 2] or [KEYS // 4, M, 2, 2]
        if not IN_COLUMNS:
            kept = kept.permute(0, 2, 3, 1)
    if IN_COLUMNS:
        kept = kept.reshape(rows.shape[0], KEYS)
    else:
        kept = kept.reshape(KEYS, rows.shape[1])
    return kept


@triton.jit
def is_kept(word, keep_from):
    """word >= keep_from + 2^31, both unsigned."""
    return word.to(tl.int32, bitcast=True) ^ -2147483648 >= keep_from


@triton.jit
def lost_in_rounding(exact, rounded):
    """exact - rounded in 256ths of the last place of `rounded`, bf16 or fp16, as int8: `core.rounding`.

    fp32, which stands for bf16 in Triton's interpreter, loses nothing.
    """
    SHIFT: tl.constexpr = 15 - rounded.dtype.fp_mantissa_width if rounded.dtype != tl.float32 else 0
    HALF: tl.constexpr = (1 << SHIFT) >> 1
    lost = exact.to(tl.int32, bitcast=True) - rounded.to(tl.float32).to(tl.int32, bitcast=True)
    lost = tl.minimum(lost, (128 << SHIFT) - HALF - 1)
    if SHIFT < 8:  # bf16 has fp32's exponents, so that only NaN loses more
        lost = tl.maximum(lost, -(128 << SHIFT))
    return ((lost + HALF) >> SHIFT).to(tl.int8)


# ---- Softmax


@triton.jit
def probabilities(s, bias, keep, factor, softcap, m_i, MASKED: tl.constexpr, ENTROPY: tl.constexpr):
    """One step of the online softmax, relative to the new maximum m_i [BLOCK_M]: (p, weighted, alpha, moved, m_i).

    s [BLOCK_M, BLOCK_N] lacks the factor >= 0; bias, in base 2, broadcasts to it or is None; keep has the visible pairs
    where MASKED. m_i is the maximum of the uncapped logits; the capped one, the shift, is subtracted. It has `moved` by
    so much, which shrinks earlier sums by alpha = exp(moved). weighted is p (z_j - shift) where ENTROPY.
    """
    if bias is not None:
        s = tl.fma(s, factor[:, None], bias)
    if MASKED:
        s = tl.where(keep, s, float("-inf"))
    m_new = tl.max(s, 1)
    if bias is None:
        m_new *= factor
    m_new = tl.maximum(m_i, m_new)
    if softcap is None:
        previous, shift = m_i, m_new
        if MASKED or bias is not None:
            shift = tl.where(m_new == float("-inf"), 0.0, m_new)
        if bias is None:
            exponent = tl.fma(s, factor[:, None], (-shift)[:, None])
        else:
            exponent = s - shift[:, None]
    else:
        previous, shift = soft_cap(m_i, softcap), soft_cap(m_new, softcap)
        if bias is None:
            s *= factor[:, None]
        exponent = soft_cap(s, softcap) - shift[:, None]
        if MASKED:
            exponent = tl.where(keep, exponent, float("-inf"))
        if bias is not None:
            exponent = tl.where(bias == float("-inf"), float("-inf"), exponent)
    p = tl.exp2(exponent)  # [BLOCK_M, BLOCK_N]
    moved = previous - shift
    alpha = tl.exp2(moved)
    weighted = p
    if ENTROPY:
        if bias is not None:
            exponent = tl.where(exponent == float("-inf"), 0.0, exponent)
        elif MASKED:
            exponent = tl.where(keep, exponent, 0.0)
        weighted = p * exponent
    return p, weighted, alpha, moved, m_new


@triton.jit
def moved_sums(p, weighted, alpha, moved, l_i, spread, ENTROPY: tl.constexpr):
    """(l_i, spread) after a step of `probabilities`: the sums of p, and of exp(z_j - shift) (z_j - shift).

    Both are `partial_sums`, [BLOCK_M, columns].
    """
    COLUMNS: tl.constexpr = l_i.shape[1]
    alphas = tl.broadcast_to(alpha[:, None], l_i.shape)
    if ENTROPY:
        before = tl.where(l_i > 0.0, moved[:, None], 0.0)
        spread = tl.fma(tl.fma(before, l_i, spread), alphas, partial_sums(weighted, COLUMNS))
    return tl.fma(l_i, alphas, partial_sums(p, COLUMNS)), spread


@triton.jit
def joint_peak(shift, sink):
    """(peak, weight, of_sink): the larger of both, exp2(shift - peak) and exp2(sink - peak).

    +inf as a sink gives (inf, 0, 1), and NaN (shift, 1, NaN).
    """
    is_higher = sink > shift
    peak, other = tl.where(is_higher, sink, shift), tl.where(is_higher, shift, sink)
    ratio = tl.exp2(other - peak)
    return peak, tl.where(is_higher, ratio, 1.0), tl.where(is_higher, 1.0, ratio)


@triton.jit
def finish_softmax(m_i, l_i, spread, factor, softcap, sinks, batch, head, rows, results, offsets, keep):
    """(l_i, weight, total) of rows [BLOCK_M], whose output is weight * acc / total; stores lse, max_logit and entropy.

    A row without keys has l_i 0, total 1, lse and max_logit -inf, entropy 0. A sink joins the total only: -inf is no
    sink, +inf gives weight 0, and NaN a total of NaN. rows are those of `sinks`, a `Scale` or None.
    """
    l_i, spread = tl.sum(l_i, 1), tl.sum(spread, 1)
    empty = l_i == 0.0
    total = tl.where(empty, 1.0, l_i)
    shift = m_i
    if softcap is not None:
        shift = soft_cap(m_i, softcap)
    shift = tl.where(empty, 0.0, shift)
    tl.store(results.lse + offsets, tl.where(empty, float("-inf"), (shift + tl.log2(total)) * LN_2), mask=keep)
    if results.max_logit is not None:
        max_logit = tl.where((factor == TINY) & (l_i > 0.0), 0.0, m_i * LN_2)  # TINY stands for 0
        max_logit = tl.where(l_i == l_i, max_logit, l_i)  # tl.max ignores NaN; the sum keeps it
        tl.store(results.max_logit + offsets, max_logit, mask=keep)
    if results.entropy is not None:
        entropy = tl.where(empty, 0.0, (tl.log2(total) - spread / total) * LN_2)
        tl.store(results.entropy + offsets, tl.where(entropy < 0.0, 0.0, entropy), mask=keep)
    weight = 1.0
    if sinks is not None:
        sink = tl.load(vector_from(sinks, batch, head, 0, rows), mask=keep, other=0.0)  # [BLOCK_M]
        _, weight, of_sink = joint_peak(shift, sink * LOG2_E)
        total = tl.where(empty, 1.0, tl.fma(l_i, weight, of_sink))
    return l_i, weight, total


# ---- Terms of rows, in the backward


@triton.jit
def terms_offset(batch, head, sequence, first_row, q_heads, terms_len, q_starts):
    """Offset of the row terms of one (batch or sequence, head) in [B, Hq, terms_len].

    It is a multiple of ROW_TERMS_ALIGNMENT, with room up to the next one, also where sequences are packed.
    """
    first = 0
    if q_starts is not None:
        first = (first_row + sequence * ROW_TERMS_ALIGNMENT) // ROW_TERMS_ALIGNMENT * ROW_TERMS_ALIGNMENT
    return (batch.to(tl.int64) * q_heads + head) * terms_len + first


@triton.jit
def load_term(pointers, otherwise, SPLIT: tl.constexpr):
    """(term, factor) of rows in fp32; the factor is `otherwise` where rows have none.

    pointers   to fp32, the term alone; or to int64, the term in the low half and the factor in the high one
    SPLIT      load the halves one by one: twice the loads, but neighbouring registers hold neighbouring rows, as packed
               arithmetic wants them: 3 to 4 % fewer instructions of a loop (sm_100; static, triton 3.9)
    """
    factor = otherwise
    if pointers.dtype.element_ty == tl.float32:
        term = tl.load(pointers)
    elif SPLIT:
        halves = pointers.to(tl.pointer_type(tl.float32))
        term, factor = tl.load(halves), tl.load(halves + 1)
    else:
        both = tl.load(pointers)
        term = both.to(tl.int32).to(tl.float32, bitcast=True)
        factor = (both >> 32).to(tl.int32).to(tl.float32, bitcast=True)
    return term, factor


@triton.jit
def store_term(pointers, term, factor, keep):
    """Store a term, and the factor next to it where pointers are to int64, as `load_term` loads them."""
    if pointers.dtype.element_ty == tl.int64:
        low = term.to(tl.int32, bitcast=True).to(tl.int64) & 0xFFFFFFFF
        term = (factor.to(tl.int32, bitcast=True).to(tl.int64) << 32) | low
    tl.store(pointers, term, mask=keep)
