"""Pieces that every attention kernel shares: tiles, arithmetic, dropout, and the terms of rows.

Names: `offs_*` are vectors of indices, `*_ptr` pointers, CAPITALS constexprs. Logits live in base 2 inside a kernel:
exp(x) = exp2(x * log2(e)). Every multiply-add is an explicit fma, so that results do not depend on Triton's fp-fusion
default.
"""

from __future__ import annotations

import triton
import triton.language as tl

LOG2_E = tl.constexpr(1.4426950408889634)
LN_2 = tl.constexpr(0.6931471805599453)
# fp32's smallest normal number. It stands for a factor of 0 where a hidden logit is -inf, since -inf * 0 is NaN.
TINY = tl.constexpr(2.0**-126)
# Row terms of the backward are padded to a multiple of this, so every block of rows up to it divides them.
ROW_TERMS_ALIGNMENT = tl.constexpr(128)


# Arguments whose values change from call to call: compiled code does not depend on them.
LENGTHS = [
    "q_len",
    "k_len",
    "terms_len",
    "addends_len",
    "left",
    "right",
    "keep_from",
    "first_y",
    "first_z",
    "q_heads",
    "kv_heads",
    "capacity",
    "key_block",
    "bounds_len",
]


@triton.jit
def tile_offsets(ROWS: tl.constexpr, COLUMNS: tl.constexpr, row_stride, column_stride, WIDE: tl.constexpr):
    """Element offsets of a [ROWS, COLUMNS] tile from its first element; int64 where WIDE."""
    offs_row = tl.arange(0, ROWS)
    offs_column = tl.arange(0, COLUMNS)
    if WIDE:
        offs_row = offs_row.to(tl.int64)
        offs_column = offs_column.to(tl.int64)
    return offs_row[:, None] * row_stride + offs_column[None, :] * column_stride


@triton.jit
def load_tile(pointers, keep_row, WIDTH: tl.constexpr, MASKED: tl.constexpr, LAST: tl.constexpr = False):
    """A [ROWS, COLUMNS] tile; columns at and after WIDTH are 0, and where MASKED so are rows that keep_row drops.

    LAST: the program does not load the tile again, so that caches may drop it first.
    """
    COLUMNS: tl.constexpr = pointers.shape[1]
    EVICTION: tl.constexpr = "evict_first" if LAST else ""
    if MASKED and WIDTH == COLUMNS:
        tile = tl.load(pointers, mask=keep_row[:, None], other=0.0, eviction_policy=EVICTION)
    elif MASKED:
        keep = keep_row[:, None] & (tl.arange(0, COLUMNS)[None, :] < WIDTH)
        tile = tl.load(pointers, mask=keep, other=0.0, eviction_policy=EVICTION)
    elif WIDTH == COLUMNS:
        tile = tl.load(pointers, eviction_policy=EVICTION)
    else:
        tile = tl.load(pointers, mask=tl.arange(0, COLUMNS)[None, :] < WIDTH, other=0.0, eviction_policy=EVICTION)
    return tile


@triton.jit
def store_tile(pointers, tile, keep_row, WIDTH: tl.constexpr):
    """Store the rows that keep_row keeps, the first WIDTH columns."""
    COLUMNS: tl.constexpr = pointers.shape[1]
    keep = keep_row[:, None] & (tl.arange(0, COLUMNS)[None, :] < WIDTH)
    tl.store(pointers, tile.to(pointers.dtype.element_ty), mask=keep)


@triton.jit
def lost_in_rounding(exact, rounded):
    """exact - rounded in 256ths of the last place of `rounded`, bf16 or fp16, as int8: `core.rounding`.

    Of fp32, which stands for bf16 in Triton's interpreter, nothing is lost.
    """
    SHIFT: tl.constexpr = 15 - rounded.dtype.fp_mantissa_width if rounded.dtype != tl.float32 else 0
    HALF: tl.constexpr = (1 << SHIFT) >> 1
    lost = exact.to(tl.int32, bitcast=True) - rounded.to(tl.float32).to(tl.int32, bitcast=True)
    lost = tl.minimum(lost, (128 << SHIFT) - HALF - 1)
    if SHIFT < 8:  # bf16 has fp32's exponents, so that only NaN loses more
        lost = tl.maximum(lost, -(128 << SHIFT))
    return ((lost + HALF) >> SHIFT).to(tl.int8)


@triton.jit
def before_rounding(rounded, lost):
    """The fp32 that `rounded` was, from what it lost: `core.rounding`."""
    SHIFT: tl.constexpr = 15 - rounded.dtype.fp_mantissa_width if rounded.dtype != tl.float32 else 0
    bits = rounded.to(tl.float32).to(tl.int32, bitcast=True) + (lost.to(tl.int32) << SHIFT)
    return bits.to(tl.float32, bitcast=True)


@triton.jit
def load_signed(pointers, scratch_ptrs, factor, keep_row, WIDTH: tl.constexpr, SCRATCH_WIDTH: tl.constexpr):
    """A tile whose rows take the sign of their factor. scratch_ptrs: the program's own rows of SCRATCH_WIDTH elements.

    A changed sign goes through memory: an MMA reads its left operand from shared memory only if the operand comes
    straight from a load, and reading it from registers costs half an instruction a logit (sm_90, D 128).
    """
    if SCRATCH_WIDTH >= WIDTH:
        if tl.min(factor, 0) < 0.0:
            tile = load_tile(pointers, keep_row, WIDTH, True)
            store_tile(scratch_ptrs, tl.where((factor < 0)[:, None], -tile, tile), keep_row, WIDTH)
            tl.debug_barrier()
            pointers = scratch_ptrs
        tile = load_tile(pointers, keep_row, WIDTH, True)
    else:
        tile = load_tile(pointers, keep_row, WIDTH, True)
        tile = tl.where((factor < 0)[:, None], -tile, tile)
    return tile


@triton.jit
def partial_sums(x, COLUMNS: tl.constexpr):
    """x[m, n] added up to [m, COLUMNS], column c from every n = c modulo COLUMNS.

    mma.sync and wgmma leave two neighbours of every 8 columns in one lane: with 8 no lane needs another's sum.
    """
    return tl.sum(x.reshape(x.shape[0], x.shape[1] // COLUMNS, COLUMNS), 1)


@triton.jit
def scale_rows_add(x, factor, addend):
    """x[m, n] * factor[m] + addend[m] with one rounding."""
    return tl.fma(x, tl.broadcast_to(factor[:, None], x.shape), tl.broadcast_to(addend[:, None], x.shape))


@triton.jit
def scale_columns_add(x, factor, addend):
    """x[m, n] * factor[n] + addend[n] with one rounding; factor may be a scalar."""
    if factor.type.is_block():
        factor = factor[None, :]
    return tl.fma(x, tl.broadcast_to(factor, x.shape), tl.broadcast_to(addend[None, :], x.shape))


@triton.jit
def scale_add_bias(x, factor, bias):
    """x * factor + bias with one rounding; factor and bias broadcast to x."""
    return tl.fma(x, tl.broadcast_to(factor, x.shape), tl.broadcast_to(bias, x.shape))


@triton.jit
def _tanh(x):
    """tanh within 2 ulp: below 0.6 an odd polynomial (tanh(x) / x by least squares on Chebyshev nodes), else by exp."""
    square = x * x
    series = tl.full(x.shape, -0.005883233156055212, tl.float32)
    series = tl.fma(series, square, tl.full(x.shape, 0.020785147324204445, tl.float32))
    series = tl.fma(series, square, tl.full(x.shape, -0.05378039926290512, tl.float32))
    series = tl.fma(series, square, tl.full(x.shape, 0.13331879675388336, tl.float32))
    series = tl.fma(series, square, tl.full(x.shape, -0.33333295583724976, tl.float32))
    small = tl.fma(x * square, series, x)
    magnitude = 1.0 - 2.0 / (tl.exp2(tl.abs(x) * (2.0 * LOG2_E)) + 1.0)
    return tl.where(tl.abs(x) < 0.6, small, tl.where(x < 0.0, -magnitude, magnitude))


@triton.jit
def soft_cap(x, softcap):
    """softcap * tanh(x / softcap) for x in base 2 and softcap in natural units."""
    limit = softcap * LOG2_E
    return _tanh(x * (1.0 / limit)) * limit


@triton.jit
def soft_cap_slope(capped, softcap):
    """The derivative of `soft_cap` from its result."""
    ratio = capped * (1.0 / (softcap * LOG2_E))
    return tl.fma(-ratio, ratio, tl.full(capped.shape, 1.0, tl.float32))


@triton.jit
def dropout_keeps(dropout, offs_row, offs_key):
    """Keep bits of pairs of rows and keys, whose indices in the packed axes broadcast.

    The first word of Philox4x32-10 (Salmon et al. 2011), as a signed number, is compared with dropout.keep_from. The
    counter is (key, row, dropout.batch_head, offset).
    """
    seed, offset = tl.load(dropout.state), tl.load(dropout.state + 1)
    zero = (offs_row + offs_key) * 0
    counter = zero + offs_key, zero + offs_row, zero + dropout.batch_head, zero + offset.to(tl.int32)
    word, _, _, _ = tl.philox(seed, counter[0], counter[1], counter[2], counter[3], 10)
    return word.to(tl.int32, bitcast=True) ^ -2147483648 >= dropout.keep_from


@triton.jit
def load_vector(pointers, keep, MASKED: tl.constexpr):
    """One number for each key; where MASKED, 0 for keys that keep drops."""
    if MASKED:
        vector = tl.load(pointers, mask=keep, other=0.0)
    else:
        vector = tl.load(pointers)
    return vector


@triton.jit
def program_position(first_y, first_z, LAST_FIRST: tl.constexpr):
    """(block, head, member) of this program, the three axes of its grid; a member is a batch entry or a sequence.

    first_y, first_z   where this launch begins: a grid past the hardware's limit takes several
    LAST_FIRST         start with the last block
    """
    block = tl.program_id(0)
    if LAST_FIRST:
        block = tl.num_programs(0) - 1 - block
    return block, first_y + tl.program_id(1), first_z + tl.program_id(2)


@triton.jit
def program_in_section(heads, first_y, first_z, LAST_FIRST: tl.constexpr, LANES: tl.constexpr):
    """(block, head, member) of this program of the grid (heads of a section, blocks, sections): `tuning.order`.

    Programs start in the order of the grid's first axis, then the second: all heads of a section take their longest
    block first. The sections cut the heads of all members, one member's after another's.

    heads              of a member
    first_y, first_z   where this launch begins: a grid past the hardware's limit takes several
    LAST_FIRST         start with the last block, which has the most keys under a causal mask
    LANES              dies to which the hardware deals programs in turn: neighbouring heads stay on one
    """
    count, slot = tl.num_programs(0), tl.program_id(0)
    if LANES > 1:
        slot = tl.where(count % LANES == 0, slot % LANES * (count // LANES) + slot // LANES, slot)
    block = tl.program_id(1)
    if LAST_FIRST:
        block = tl.num_programs(1) - 1 - block
    index = (first_z + tl.program_id(2)) * count + slot
    member = index // heads
    return first_y + block, index % heads, member


@triton.jit
def terms_offset(place, terms_len, starts):
    """Offset of the row terms of one (batch or sequence, head) in [B, Hq, terms_len].

    It is a multiple of ROW_TERMS_ALIGNMENT, with room up to the next one, also where sequences are packed.
    """
    first = 0
    if starts is not None:
        first = (place.first_row + place.member * ROW_TERMS_ALIGNMENT) // ROW_TERMS_ALIGNMENT * ROW_TERMS_ALIGNMENT
    return (place.batch.to(tl.int64) * place.q_heads + place.head) * terms_len + first


@triton.jit
def load_term(pointers, otherwise, SPLIT: tl.constexpr):
    """(term, factor) of rows in fp32; the factor is `otherwise` where rows have none.

    pointers   to fp32, the term alone; or to int64, the term in the low half and the factor in the high one
    SPLIT      load the halves one by one: twice the loads, but terms of one kind in neighbouring registers, as packed
               arithmetic wants them (sm_100)
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
    """Store a term, and beside it the factor where pointers are to int64, as `load_term` loads them."""
    if pointers.dtype.element_ty == tl.int64:
        low = term.to(tl.int32, bitcast=True).to(tl.int64) & 0xFFFFFFFF
        term = (factor.to(tl.int32, bitcast=True).to(tl.int64) << 32) | low
    tl.store(pointers, term, mask=keep)


@triton.jit
def joint_peak(shift, sink):
    """(peak, weight, of_sink): the larger of both, exp2(shift - peak) and exp2(sink - peak).

    +inf as a sink gives (inf, 0, 1), and NaN (shift, 1, NaN).
    """
    is_higher = sink > shift
    peak, other = tl.where(is_higher, sink, shift), tl.where(is_higher, shift, sink)
    ratio = tl.exp2(other - peak)
    return peak, tl.where(is_higher, ratio, 1.0), tl.where(is_higher, 1.0, ratio)
