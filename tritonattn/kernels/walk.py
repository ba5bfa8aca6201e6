"""Visible keys of rows, and the walk of a block of rows over the blocks of keys at which it looks."""

from __future__ import annotations

import triton
import triton.language as tl

from .addresses import begin, begin_bias, begin_pages, begin_scale, begin_seen, load_paged, page_slots
from .primitives import LOG2_E, load_tile, load_vector, tile_offsets
from .records import KeyBlock, Keys, Rows, Sight, Walk


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
def _walk_blocks(
    state,
    STEP: tl.constexpr,
    terms,
    q,
    keys,
    sight,
    walk,
    HEAD_DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    BLOCK_DV: tl.constexpr,
    BLOCK_N: tl.constexpr,
    WIDE: tl.constexpr,
    SUMS: tl.constexpr,
    MASKED: tl.constexpr,
    INVARIANT: tl.constexpr,
):
    """The state after STEP has taken the full blocks of a walk, or, where MASKED, the others: see `walk_keys`."""
    # Masks hold registers: masked steps take half of a wide block.
    N: tl.constexpr = BLOCK_N // 2 if MASKED and BLOCK_N >= 64 and not INVARIANT else BLOCK_N
    start, end = walk_span(walk, N, MASKED)
    k_offsets = tile_offsets(N, q.shape[1], keys.k.s, keys.k.d, WIDE)
    v_offsets = tile_offsets(N, BLOCK_DV, keys.v.s, keys.v.d, WIDE)
    batch, head, at = sight.place.batch, sight.place.kv_head, sight.place.first_key
    if keys.scale is not None:
        # Carried along: addresses made from the position would make the loop's counter one of 64 bits.
        scale_step = tl.cast(keys.scale.s, tl.int64)
        scale_ptrs = keys.scale.ptr + (start + tl.arange(0, N)) * scale_step
    if keys.bias is not None:
        bias_step = tl.cast(keys.bias.s, tl.int64)
        bias_ptrs = keys.bias.ptr + (start + tl.arange(0, N)) * bias_step
    for position in tl.range(start, end, N):
        first, offs_key = block_at(position, walk, N, MASKED)
        load_key = (offs_key >= walk.touch_lo) & (offs_key < walk.touch_hi)
        if MASKED and keys.seen is not None:
            load_key = load_key & (tl.load(keys.seen + offs_key, mask=load_key, other=0) != 0)
        if keys.pages is None:
            k = load_rows(keys.k, keys.k_descriptor, k_offsets, batch, head, at, first, load_key, HEAD_DIM, MASKED)
            v = load_rows(keys.v, keys.v_descriptor, v_offsets, batch, head, at, first, load_key, VALUE_DIM, MASKED)
        else:
            number, slot, is_held = page_slots(keys.pages, offs_key, load_key, MASKED)
            k = load_paged(keys.k, number, slot, is_held, q.shape[1], HEAD_DIM, WIDE)
            v = load_paged(keys.v, number, slot, is_held, BLOCK_DV, VALUE_DIM, WIDE)
        logits = tl.dot(q, k.T, input_precision="ieee")  # [BLOCK_M, N]
        key_scale = None
        if keys.scale is not None:
            if MASKED:
                scale_ptrs = keys.scale.ptr + offs_key * scale_step
            key_scale = load_vector(scale_ptrs, load_key, MASKED)
            scale_ptrs += N * scale_step
            logits *= key_scale[None, :]
        key_bias = None
        if keys.bias is not None:
            if MASKED:
                bias_ptrs = keys.bias.ptr + offs_key * bias_step
            key_bias = load_vector(bias_ptrs, load_key, MASKED) * LOG2_E
            bias_ptrs += N * bias_step
        state = STEP(state, KeyBlock(offs_key, k, v, logits), key_scale, key_bias, terms, sight, SUMS, MASKED)
    return state


@triton.jit
def walk_keys(
    state,
    STEP: tl.constexpr,
    terms,
    q,
    keys,
    sight,
    HEAD_DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    BLOCK_DV: tl.constexpr,
    BLOCK_N: tl.constexpr,
    WIDE: tl.constexpr,
    SUMS: tl.constexpr,
    INVARIANT: tl.constexpr,
    walk=None,
):
    """(state, walk): the state after STEP has taken the blocks of keys at which a block of rows looks.

        state = STEP(state, block, key_scale, key_bias, terms, sight, SUMS, MASKED)

    The blocks that need a mask come first, then the others; or, where INVARIANT, all in ascending order.

    block                 `KeyBlock`
    key_scale, key_bias   of its keys, [N], or None; the bias in base 2
    terms, SUMS           STEP's own
    q                     tile of the rows
    walk                  None: over all keys that the rows see, and returned; or another, whose blocks all need a mask
    """
    place, rows, view = sight.place, sight.rows, sight.view
    batch, head, kv_head, first_key = place.batch, place.head, place.kv_head, place.first_key
    if keys.pages is None:
        k, v = begin(keys.k, batch, kv_head, first_key), begin(keys.v, batch, kv_head, first_key)
    else:
        k, v = begin(keys.k, 0, kv_head, 0), begin(keys.v, 0, kv_head, 0)
    keys = Keys(
        k,
        v,
        keys.k_descriptor,
        keys.v_descriptor,
        None if keys.scale is None else begin_scale(keys.scale, batch, kv_head, first_key),
        None if keys.bias is None else begin_bias(keys.bias, batch, kv_head, head % place.group, first_key),
        None if keys.seen is None else begin_seen(keys.seen, place, view.k_len),
        None if keys.pages is None else begin_pages(keys.pages, place.member),
    )
    sight = Sight(place, rows, view, None if sight.mask is None else begin(sight.mask, batch, head, 0))
    GIVEN: tl.constexpr = walk is not None
    FIRST: tl.constexpr = 1 if INVARIANT and not GIVEN and view.left is None and view.key_ranges is None else 0
    if not GIVEN:
        walk = walk_over_keys(rows, batch, view, BLOCK_N, sight.mask is not None)
    for turn in tl.static_range(FIRST, 1 if GIVEN else 3 if INVARIANT else 2):
        if turn != 1 or sight.mask is None:
            part = part_of_walk(walk, turn) if INVARIANT and not GIVEN else walk
            state = _walk_blocks(
                state,
                STEP,
                terms,
                q,
                keys,
                sight,
                part,
                HEAD_DIM,
                VALUE_DIM,
                BLOCK_DV,
                BLOCK_N,
                WIDE,
                SUMS,
                turn != 1,
                INVARIANT,
            )
    return state, walk
