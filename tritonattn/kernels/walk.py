"""Visible keys of rows, and the walk over the blocks of keys, or of rows, that a program looks at."""

from __future__ import annotations

import triton
import triton.language as tl

from .primitives import LOG2_E, load_tile, load_vector, tile_offsets
from .records import KeyBlock, MemberPages, Place, Rows, Scale, Strided, Walk


@triton.jit
def begin(x, batch, head, row):
    """The `Strided` of x from one (batch entry, head) and row on."""
    batch, head, row = tl.cast(batch, tl.int64), tl.cast(head, tl.int64), tl.cast(row, tl.int64)
    return Strided(x.ptr + (batch * x.b + head * x.h + row * x.s), x.b, x.h, x.s, x.d)


@triton.jit
def begin_scale(x, batch, head, row):
    """The `Scale` of x from one (batch entry, head) and row on."""
    first = begin(Strided(x.ptr, x.b >> 4, x.h >> 4, x.s, 1), batch, head, row)
    return Scale(first.ptr, x.b, x.h, x.s)


@triton.jit
def begin_bias(x, batch, kv_head, member, first_key):
    """The `Scale` of a `Bias` from one (batch entry, query head) and key on; the head is a member of a group."""
    first = begin(Strided(x.ptr, x.b >> 4, x.h >> 4, x.g >> 4, x.s), batch, kv_head, member)
    return Scale(first.ptr + tl.cast(first_key, tl.int64) * x.s, x.b, x.h, x.s)


@triton.jit
def begin_pages(pages, member):
    """The `MemberPages` of one member. With b bits, floor(j * (floor(2^(31 + b) / size) + 1) / 2^(31 + b)) is j // size
    for all j < 2^31 (Granlund & Montgomery 1994, "Division by invariant integers using multiplication")."""
    size, count, length, bits = pages.size >> 4, pages.count >> 4, pages.length >> 4, pages.bits >> 4
    inverse = (tl.cast(1, tl.int64) << (31 + bits).to(tl.int64)) // size + 1
    table = pages.table + tl.cast(member, tl.int64) * length
    return MemberPages(table, size, count, length, inverse.to(tl.uint32), bits - 1)


@triton.jit
def page_slots(pages, offs_key, keep, MASKED: tl.constexpr):
    """(number, slot, is_held) of keys, vectors: their page, their place in it, and whether there is such a page.

    Where MASKED, keys that keep drops are in none.
    """
    index = (tl.umulhi(offs_key.to(tl.uint32), pages.inverse) >> pages.shift).to(tl.int32)
    is_listed = index < pages.length
    if MASKED:
        is_listed = is_listed & keep
    number = tl.load(pages.table + index, mask=is_listed, other=-1)
    return number, offs_key - index * pages.size, (number >= 0) & (number < pages.count)


@triton.jit
def load_paged(x, number, slot, is_held, COLUMNS: tl.constexpr, WIDTH: tl.constexpr, WIDE: tl.constexpr):
    """The tile of keys at slots of numbered pages; x begins with the first slot of page 0 of a head."""
    columns = tl.arange(0, COLUMNS)
    if WIDE:
        slot, columns = slot.to(tl.int64), columns.to(tl.int64)
    pointers = (x.ptr + number.to(tl.int64) * x.b)[:, None] + (slot[:, None] * x.s + columns[None, :] * x.d)
    return load_tile(pointers, is_held, WIDTH, True)


@triton.jit
def in_vectors(x, ALIGNED: tl.constexpr):
    """x, a `Strided`; where ALIGNED, the compiler learns that its strides are multiples of 16 bytes.

    Triton itself only knows multiples of 16 elements: rows of 72 numbers of 16 bits would load one by one.
    """
    if ALIGNED:
        STEP: tl.constexpr = 128 // x.ptr.dtype.element_ty.primitive_bitwidth
        x = Strided(x.ptr, x.b // STEP * STEP, x.h // STEP * STEP, x.s // STEP * STEP, x.d)
    return x


@triton.jit
def place_of_member(member, head, kv_head, q_len, k_len, starts):
    """(Place, rows, keys) of batch entry or packed sequence `member`; starts is a `Starts` or None."""
    batch, first_row, first_key = member, member * 0, member * 0
    if starts is not None:
        first_row, first_key = tl.load(starts.q + member), tl.load(starts.k + member)
        q_len = tl.load(starts.q + member + 1) - first_row
        k_len = tl.load(starts.k + member + 1) - first_key
        batch = member * 0
    return Place(batch, head, kv_head, first_row, first_key), q_len, k_len


@triton.jit
def range_pointers(view, batch, row):
    """Pointers to the lower of the two bounds that key_ranges have for a row, or for a vector of rows."""
    return view.key_ranges + (batch.to(tl.int64) * view.q_len + row) * 2


@triton.jit
def row_range(row, batch, view):
    """The visible keys lo <= j < hi of a row or a vector of rows below q_len; lo >= hi is a row without keys.

    left, right      j >= row + k_len - q_len - left, j <= row + k_len - q_len + right
    key_lengths      j < key_lengths[batch]
    key_ranges       key_ranges[batch, row, 0] <= j < key_ranges[batch, row, 1]
    """
    own = row + (view.k_len - view.q_len)
    lo = row * 0
    hi = lo + view.k_len
    if view.left is not None:
        lo = tl.maximum(own - view.left, 0)
    if view.right is not None:
        hi = tl.minimum(own + (view.right + 1), hi)
    if view.key_lengths is not None:
        hi = tl.minimum(hi, tl.load(view.key_lengths + batch))
    if view.key_ranges is not None:
        pointers = range_pointers(view, batch, row)
        lo = tl.maximum(lo, tl.load(pointers))
        hi = tl.minimum(hi, tl.load(pointers + 1))
    return lo, hi


@triton.jit
def rows_of_block(first, batch, view, BLOCK_M: tl.constexpr):
    """The `Rows` from `first` on."""
    offs_m = first + tl.arange(0, BLOCK_M)
    offs = tl.minimum(offs_m, view.q_len - 1)
    lo, hi = row_range(offs, batch, view)
    return Rows(first, tl.minimum(first + BLOCK_M, view.q_len) - 1, offs, offs_m < view.q_len, lo, hi)


@triton.jit
def walk_between(touch_lo, touch_hi, full_lo, full_hi, BLOCK: tl.constexpr, MASKED: tl.constexpr):
    """The `Walk` over what touches [touch_lo, touch_hi), all of it seen in [full_lo, full_hi), nowhere where MASKED."""
    full_start = (full_lo + BLOCK - 1) // BLOCK * BLOCK
    full_end = tl.maximum(full_hi, 0) // BLOCK * BLOCK
    if MASKED:
        full_end = full_start
    if full_end <= full_start:
        full_start = touch_lo // BLOCK * BLOCK
        full_end = full_start
    return Walk(touch_lo, touch_hi, full_start, full_end)


@triton.jit
def bounds_of_ranges(lo, hi, k_len):
    """(touch_lo, touch_hi, full_lo, full_hi) of rows that see lo <= j < hi, vectors."""
    touch_lo = tl.min(tl.where(lo < hi, lo, k_len), 0)
    touch_hi = tl.max(tl.where(lo < hi, hi, 0), 0)
    return touch_lo, touch_hi, tl.max(lo, 0), tl.min(hi, 0)


@triton.jit
def walk_over_keys(rows, batch, view, BLOCK_N: tl.constexpr, MASKED: tl.constexpr):
    """The `Walk` of a block of rows over keys. MASKED: every block needs a mask."""
    if view.key_ranges is None:
        touch_lo, full_hi = row_range(rows.first, batch, view)
        full_lo, touch_hi = row_range(rows.last, batch, view)
    else:
        touch_lo, touch_hi, full_lo, full_hi = bounds_of_ranges(rows.lo, rows.hi, view.k_len)
    return walk_between(touch_lo, touch_hi, full_lo, full_hi, BLOCK_N, MASKED)


@triton.jit
def walk_over_rows(first, last, batch, view, bounds_ptr, BLOCK_M: tl.constexpr, MASKED: tl.constexpr):
    """The `Walk` of the keys first .. last, both below k_len, over the rows that see them. MASKED: all need a mask.

    bounds_ptr   int32 [2] of this block, or None: the first row and one past the last row whose key_ranges touch it
    """
    shift = view.k_len - view.q_len
    touch_lo = first * 0
    touch_hi = touch_lo + view.q_len
    full_lo, full_hi = touch_lo, touch_hi
    if view.right is not None:
        touch_lo = tl.maximum(first - shift - view.right, 0)
        full_lo = tl.maximum(last - shift - view.right, 0)
    if view.left is not None:
        touch_hi = tl.maximum(tl.minimum(last - shift + view.left + 1, view.q_len), 0)
        full_hi = tl.maximum(tl.minimum(first - shift + view.left + 1, view.q_len), 0)
    if view.key_lengths is not None:
        length = tl.load(view.key_lengths + batch)
        touch_hi = tl.where(first < length, touch_hi, 0)
        full_hi = tl.where(last < length, full_hi, 0)
    if bounds_ptr is not None:
        touch_lo = tl.maximum(touch_lo, tl.load(bounds_ptr))
        touch_hi = tl.minimum(touch_hi, tl.load(bounds_ptr + 1))
    return walk_between(touch_lo, touch_hi, full_lo, full_hi, BLOCK_M, MASKED)


@triton.jit
def part_of_walk(walk, PART: tl.constexpr):
    """The `Walk` over the masked blocks before the full ones (PART 0), over the full ones (1), or those behind (2)."""
    if PART == 0:
        walk = Walk(walk.touch_lo, tl.minimum(walk.touch_hi, walk.full_start), walk.full_start, walk.full_start)
    if PART == 2:
        walk = Walk(tl.maximum(walk.touch_lo, walk.full_end), walk.touch_hi, walk.full_end, walk.full_end)
    return walk


@triton.jit
def walk_span(walk, BLOCK: tl.constexpr, MASKED: tl.constexpr):
    """[start, end) of the positions of a walk: its full blocks, or, where MASKED, the others with that gap closed."""
    start, end = walk.full_start, walk.full_end
    if MASKED:
        start, end = walk.touch_lo // BLOCK * BLOCK, walk.touch_hi - (walk.full_end - walk.full_start)
    return start, end


@triton.jit
def block_at(position, walk, BLOCK: tl.constexpr, MASKED: tl.constexpr):
    """(first index, indices) of the block at a position of `walk_span`."""
    if MASKED:
        gap = walk.full_end - walk.full_start
        position = tl.where(position >= walk.full_start, position + gap, position)
    first = tl.multiple_of(position, BLOCK)
    return first, first + tl.arange(0, BLOCK)


@triton.jit
def load_rows(
    x,
    descriptor,
    offsets,
    batch,
    head,
    first,
    start,
    keep,
    WIDTH: tl.constexpr,
    MASKED: tl.constexpr,
):
    """The tile of x from row `start` on, by the tensor memory accelerator if there is a descriptor and no MASKED row.

    x            from one (batch entry, head) and row `first` on; offsets: of the tile's elements
    descriptor   of the whole tensor [B, H, S, D], or None
    """
    if MASKED or descriptor is None:
        tile = load_tile(x.ptr + start.to(tl.int64) * x.s + offsets, keep, WIDTH, MASKED)
    else:
        tile = descriptor.load([batch, head, first + start, 0]).reshape(offsets.shape[0], offsets.shape[1])
    return tile


@triton.jit
def load_mask(mask, rows, columns, row_count, column_count, row_stride, column_stride):
    """Tile [rows, columns] of a dense mask from mask.ptr on; False outside of row_count x column_count."""
    inside = (rows < row_count)[:, None] & (columns < column_count)[None, :]
    offset = rows.to(tl.int64)[:, None] * row_stride + columns.to(tl.int64)[None, :] * column_stride
    return tl.load(mask.ptr + offset, mask=inside, other=0) != 0


@triton.jit
def visible_tile(sight, offs_key):
    """Mask tile [rows, keys]: lo <= j < hi, and the dense mask."""
    rows, view, mask = sight.rows, sight.view, sight.mask
    keep = offs_key[None, :] < rows.hi[:, None]
    if view.left is not None or view.key_ranges is not None:
        keep = keep & (offs_key[None, :] >= rows.lo[:, None])
    if mask is not None:
        keep = keep & load_mask(mask, rows.offs, offs_key, view.q_len, view.k_len, mask.s, mask.d)
    return keep


@triton.jit
def walk_keys(
    state,
    STEP: tl.constexpr,
    terms,
    q,
    keys,
    pages,
    sight,
    walk,
    place,
    HEAD_DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    BLOCK_DV: tl.constexpr,
    BLOCK_N: tl.constexpr,
    WIDE: tl.constexpr,
    SUMS: tl.constexpr,
    MASKED: tl.constexpr,
):
    """The state after STEP has taken each block of keys: the full blocks of a walk, or, where MASKED, the others.

        state = STEP(state, block, key_scale, key_bias, terms, sight, SUMS, MASKED)

    key_scale and key_bias, in base 2, [keys] each, may be None; terms and SUMS are STEP's own. pages: None, or the
    `Pages` of the member, whose keys.k and keys.v then begin with the head's first slot of page 0.
    """
    start, end = walk_span(walk, BLOCK_N, MASKED)
    k_offsets = tile_offsets(BLOCK_N, q.shape[1], keys.k.s, keys.k.d, WIDE)
    v_offsets = tile_offsets(BLOCK_N, BLOCK_DV, keys.v.s, keys.v.d, WIDE)
    if keys.scale is not None:
        # Carried along: addresses made from the position would make the loop's counter one of 64 bits.
        scale_step = tl.cast(keys.scale.s, tl.int64)
        scale_ptrs = keys.scale.ptr + (start + tl.arange(0, BLOCK_N)) * scale_step
    if keys.bias is not None:
        bias_step = tl.cast(keys.bias.s, tl.int64)
        bias_ptrs = keys.bias.ptr + (start + tl.arange(0, BLOCK_N)) * bias_step
    for position in tl.range(start, end, BLOCK_N):
        first, offs_key = block_at(position, walk, BLOCK_N, MASKED)
        load_key = (offs_key >= walk.touch_lo) & (offs_key < walk.touch_hi)
        if MASKED and keys.seen is not None:
            load_key = load_key & (tl.load(keys.seen + offs_key, mask=load_key, other=0) != 0)
        if pages is None:
            batch, head, at = place.batch, place.kv_head, place.first_key
            k = load_rows(keys.k, keys.k_descriptor, k_offsets, batch, head, at, first, load_key, HEAD_DIM, MASKED)
            v = load_rows(keys.v, keys.v_descriptor, v_offsets, batch, head, at, first, load_key, VALUE_DIM, MASKED)
        else:
            number, slot, is_held = page_slots(pages, offs_key, load_key, MASKED)
            k = load_paged(keys.k, number, slot, is_held, q.shape[1], HEAD_DIM, WIDE)
            v = load_paged(keys.v, number, slot, is_held, BLOCK_DV, VALUE_DIM, WIDE)
        logits = tl.dot(q, k.T, input_precision="ieee")  # [BLOCK_M, BLOCK_N]
        key_scale = None
        if keys.scale is not None:
            if MASKED:
                scale_ptrs = keys.scale.ptr + offs_key * scale_step
            key_scale = load_vector(scale_ptrs, load_key, MASKED)
            scale_ptrs += BLOCK_N * scale_step
            logits *= key_scale[None, :]
        key_bias = None
        if keys.bias is not None:
            if MASKED:
                bias_ptrs = keys.bias.ptr + offs_key * bias_step
            key_bias = load_vector(bias_ptrs, load_key, MASKED) * LOG2_E
            bias_ptrs += BLOCK_N * bias_step
        state = STEP(state, KeyBlock(offs_key, k, v, logits), key_scale, key_bias, terms, sight, SUMS, MASKED)
    return state
