"""Pieces that every attention kernel shares: tiles, the visible keys of rows, and the bounds of blocks.

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


# Arguments whose values change from call to call: compiled code does not depend on them, but for group = 1.
LENGTHS = [
    "q_len", "k_len", "terms_len", "addends_len", "left", "right", "keep_from", "first_head", "first_member", "q_heads",
    "kv_heads", "capacity", "key_block", "bounds_len",
]  # fmt: skip
COUNTS = ["group"]


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
def load_block(
    descriptor, pointers, batch, head, first, keep_row, WIDTH: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """`load_tile`, by the tensor memory accelerator where there is a descriptor [B, H, S, D] and no row is masked."""
    if MASKED or descriptor is None:
        tile = load_tile(pointers, keep_row, WIDTH, MASKED)
    else:
        tile = descriptor.load([batch, head, first, 0]).reshape(pointers.shape[0], pointers.shape[1])
    return tile


@triton.jit
def store_tile(pointers, tile, keep_row, WIDTH: tl.constexpr):
    """Store the rows that keep_row keeps, the first WIDTH columns."""
    COLUMNS: tl.constexpr = pointers.shape[1]
    keep = keep_row[:, None] & (tl.arange(0, COLUMNS)[None, :] < WIDTH)
    tl.store(pointers, tile.to(pointers.dtype.element_ty), mask=keep)


@triton.jit
def load_signed(pointers, scratch_ptrs, factor, keep_row, WIDTH: tl.constexpr, SCRATCH_WIDTH: tl.constexpr):
    """A tile whose rows take the sign of their factor. scratch_ptrs: the program's own rows of SCRATCH_WIDTH elements.

    An MMA reads its left operand from shared memory only if that comes straight from a load, and from registers costs
    half an instruction a logit more (sm_90, D 128): so a changed sign goes through memory.
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
def _tanh(x):
    """Within 2 ulp: below 0.6 an odd polynomial (tanh(x) / x by least squares on Chebyshev nodes), else by exp."""
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
def dropout_keeps(dropout_ptr, keep_from, batch_head, offs_row, offs_key):
    """Which pairs of broadcasting rows and keys dropout keeps: the first word of Philox4x32-10 (Salmon et al. 2011), as
    a signed number, against keep_from.

    dropout_ptr   int64 [2]: seed (the key) and offset; the counter is (key, row, batch * Hq + head, offset)
    """
    seed, offset = tl.load(dropout_ptr), tl.load(dropout_ptr + 1)
    zero = (offs_row + offs_key) * 0
    word, _, _, _ = tl.philox(seed, zero + offs_key, zero + offs_row, zero + batch_head, zero + offset.to(tl.int32), 10)
    return word.to(tl.int32, bitcast=True) ^ -2147483648 >= keep_from


@triton.jit
def sequence_bounds(member, q_len, k_len, q_starts_ptr, k_starts_ptr):
    """(batch entry in memory, first row, rows, first key, keys) of batch entry or packed sequence `member`.

    q_starts_ptr, k_starts_ptr   int32 [N + 1] or None: packed sequences lie behind one another in batch entry 0, from 0
                                 up to the lengths of the packed axes, never falling
    """
    batch, first_row, first_key = member, member * 0, member * 0
    if q_starts_ptr is not None:
        first_row, first_key = tl.load(q_starts_ptr + member), tl.load(k_starts_ptr + member)
        q_len = tl.load(q_starts_ptr + member + 1) - first_row
        k_len = tl.load(k_starts_ptr + member + 1) - first_key
        batch = member * 0
    return batch, first_row, q_len, first_key, k_len


@triton.jit
def row_range(row, batch, q_len, k_len, left, right, key_lengths_ptr, key_ranges_ptr):
    """The visible keys lo <= j < hi of a row or a vector of rows below q_len; lo >= hi is a row without keys.

    left, right      int32 or None: j >= row + k_len - q_len - left, j <= row + k_len - q_len + right
    key_lengths_ptr  int32 [B] or None; key_ranges_ptr  int32 [B, Sq, 2] contiguous or None
    """
    own = row + (k_len - q_len)
    lo = row * 0
    hi = lo + k_len
    if left is not None:
        lo = tl.maximum(own - left, 0)
    if right is not None:
        hi = tl.minimum(own + (right + 1), hi)
    if key_lengths_ptr is not None:
        hi = tl.minimum(hi, tl.load(key_lengths_ptr + batch))
    if key_ranges_ptr is not None:
        range_ptr = key_ranges_ptr + (batch.to(tl.int64) * q_len + row) * 2
        lo = tl.maximum(lo, tl.load(range_ptr))
        hi = tl.minimum(hi, tl.load(range_ptr + 1))
    return lo, hi


@triton.jit
def key_blocks_of_rows(
    lo, hi, first, last, batch, q_len, k_len, left, right, key_lengths_ptr, key_ranges_ptr, mask_ptr,
    BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Where rows first .. last with ranges lo, hi look for keys: (touch_lo, touch_hi, full_start, full_end).

    Keys outside [touch_lo, touch_hi) are hidden from all rows. Those in [full_start, full_end) are visible to all and
    need no mask; both bounds are multiples of BLOCK_N, full_start <= full_end.
    """
    if key_ranges_ptr is None:
        touch_lo, full_hi = row_range(first, batch, q_len, k_len, left, right, key_lengths_ptr, None)
        full_lo, touch_hi = row_range(last, batch, q_len, k_len, left, right, key_lengths_ptr, None)
    else:
        full_lo, full_hi = tl.max(lo, 0), tl.min(hi, 0)
        touch_lo = tl.min(tl.where(lo < hi, lo, k_len), 0)
        touch_hi = tl.max(tl.where(lo < hi, hi, 0), 0)
    full_start = (full_lo + BLOCK_N - 1) // BLOCK_N * BLOCK_N
    full_end = tl.maximum(full_hi, 0) // BLOCK_N * BLOCK_N
    if mask_ptr is not None:
        full_end = full_start
    if full_end <= full_start:
        full_start = touch_lo // BLOCK_N * BLOCK_N
        full_end = full_start
    return touch_lo, touch_hi, full_start, full_end


@triton.jit
def row_blocks_of_keys(
    first, last, batch, q_len, k_len, left, right, key_lengths_ptr, row_bounds_ptr, mask_ptr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    """Which rows see a block of keys first .. last (both below k_len): (start, full_start, full_end, end).

    Rows outside [start, end) see none of them; rows in [full_start, full_end) exist and see all of them. start,
    full_start and full_end are multiples of BLOCK_M, full_start <= full_end.

    row_bounds_ptr   int32 [2] of this block or None: the first row and one past the last row whose key_ranges touch it
    """
    shift = k_len - q_len
    touch_first = first * 0
    touch_end = touch_first + q_len
    full_first, full_end = touch_first, touch_end
    if right is not None:
        touch_first = tl.maximum(first - shift - right, 0)
        full_first = tl.maximum(last - shift - right, 0)
    if left is not None:
        touch_end = tl.maximum(tl.minimum(last - shift + left + 1, q_len), 0)
        full_end = tl.maximum(tl.minimum(first - shift + left + 1, q_len), 0)
    if key_lengths_ptr is not None:
        length = tl.load(key_lengths_ptr + batch)
        touch_end = tl.where(first < length, touch_end, 0)
        full_end = tl.where(last < length, full_end, 0)
    if row_bounds_ptr is not None:
        touch_first = tl.maximum(touch_first, tl.load(row_bounds_ptr))
        touch_end = tl.minimum(touch_end, tl.load(row_bounds_ptr + 1))
    start = touch_first // BLOCK_M * BLOCK_M
    full_start = (full_first + BLOCK_M - 1) // BLOCK_M * BLOCK_M
    full_end = full_end // BLOCK_M * BLOCK_M
    if row_bounds_ptr is not None or mask_ptr is not None:
        full_end = full_start
    if full_end <= full_start:
        full_start = start
        full_end = start
    return start, full_start, full_end, touch_end


@triton.jit
def skip_gap(position, gap_start, gap_end):
    """The position in a walk over blocks that leaves out [gap_start, gap_end)."""
    return tl.where(position >= gap_start, position + (gap_end - gap_start), position)


@triton.jit
def load_mask(mask_ptr, offs_row, offs_key, q_len, k_len, row_stride, key_stride):
    """Tile [rows, keys] of a dense mask; False outside the matrix. The base pointer stands at the matrix's start."""
    inside = (offs_row < q_len)[:, None] & (offs_key < k_len)[None, :]
    offset = offs_row.to(tl.int64)[:, None] * row_stride + offs_key.to(tl.int64)[None, :] * key_stride
    return tl.load(mask_ptr + offset, mask=inside, other=0) != 0


@triton.jit
def keys_at(position, full_start, full_end, touch_lo, touch_hi, seen_ptr, BLOCK_N: tl.constexpr, MASKED: tl.constexpr):
    """(first key, keys, which of them to load) of the block at a position of the walk that MASKED chooses.

    seen_ptr   uint8 [Sk] or None: keys that some row sees
    """
    if MASKED:
        position = skip_gap(position, full_start, full_end)
    first = tl.multiple_of(position, BLOCK_N)
    offs_key = first + tl.arange(0, BLOCK_N)
    keep_key = (offs_key >= touch_lo) & (offs_key < touch_hi)
    if MASKED and seen_ptr is not None:
        keep_key = keep_key & (tl.load(seen_ptr + offs_key, mask=keep_key, other=0) != 0)
    return first, offs_key, keep_key


@triton.jit
def load_vector(pointers, keep, MASKED: tl.constexpr):
    """One number for each key; where MASKED, 0 for keys that keep drops."""
    if MASKED:
        vector = tl.load(pointers, mask=keep, other=0.0)
    else:
        vector = tl.load(pointers)
    return vector


@triton.jit
def visible_tile(
    offs_row, offs_key, lo, hi, mask_ptr, q_len, k_len, mask_stride_q, mask_stride_k, BOUNDED_BELOW: tl.constexpr,
):  # fmt: skip
    """Which keys [columns] each row sees: lo <= j < hi, and the dense mask."""
    keep = offs_key[None, :] < hi[:, None]
    if BOUNDED_BELOW:
        keep = keep & (offs_key[None, :] >= lo[:, None])
    if mask_ptr is not None:
        keep = keep & load_mask(mask_ptr, offs_row, offs_key, q_len, k_len, mask_stride_q, mask_stride_k)
    return keep


@triton.jit
def program_position(first_head, first_member, LAST_FIRST: tl.constexpr):
    """(block, head, member) of this program, the three axes of its grid; a member is a batch entry or a sequence.

    first_head, first_member   where a launch begins of the several that a grid past the hardware's limit takes
    LAST_FIRST                 starts with the last block, which under a causal mask has the most keys
    """
    block = tl.program_id(0)
    if LAST_FIRST:
        block = tl.num_programs(0) - 1 - block
    return block, first_head + tl.program_id(1), first_member + tl.program_id(2)


@triton.jit
def terms_offset(batch, head, q_heads, terms_len, member, first_packed_row, q_starts_ptr):
    """Where the row terms of one (batch or sequence, head) begin in [B, Hq, terms_len]: at a multiple of
    ROW_TERMS_ALIGNMENT, and with room up to the next one, also where sequences are packed.
    """
    first = 0
    if q_starts_ptr is not None:
        first = (first_packed_row + member * ROW_TERMS_ALIGNMENT) // ROW_TERMS_ALIGNMENT * ROW_TERMS_ALIGNMENT
    return (batch.to(tl.int64) * q_heads + head) * terms_len + first


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
    """Store what `load_term` loads; factor is not looked at where pointers are to fp32."""
    if pointers.dtype.element_ty == tl.int64:
        low = term.to(tl.int32, bitcast=True).to(tl.int64) & 0xFFFFFFFF
        term = (factor.to(tl.int32, bitcast=True).to(tl.int64) << 32) | low
    tl.store(pointers, term, mask=keep)
