"""Forward kernel of sm_90 in Gluon: as `forward`, with softmax under the products of other warpgroups.

A program has two or three warpgroups that consume, 64 rows each, and one that loads. A consumer issues S(i) = Q K(i)^T
and P(i-1) V(i-1) together and takes softmax(i) while the tensor cores work on the second and on other consumers'
products; two consumers take turns. Shape: Shah et al. 2024, arXiv:2407.08608.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia import hopper
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier, warpgroup_mma_wait
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from .block import (
    LENGTHS,
    LOG2_E,
    TINY,
    View,
    finish_softmax,
    key_bounds,
    key_range,
    moved_sums,
    partial_sums,
    probabilities,
    program_in_section,
    sequence_bounds,
    vector_from,
    visible,
)
from .forward import lost_in_rounding
from .launch import Variant

ROWS = gl.constexpr(64)  # of a consumer
SUM_COLUMNS = gl.constexpr(8)  # of partial sums: none needs another lane's
CLEARED_ROWS = gl.constexpr(8)  # of V at once: a loader's thread has 24 registers
load_tile = getattr(hopper.tma, "async_load", None) or hopper.tma.async_copy_global_to_shared  # before triton 3.8


class Ring(NamedTuple):
    """Tiles [STAGES, 1, 1, BLOCK_N, D] of k or v, and for each the mbarriers ready (loaded) and empty (used)."""

    tiles: Any
    ready: Any
    empty: Any


class Shared(NamedTuple):
    """q: tiles [consumers, 1, 1, ROWS, D], later of the output; landed: a tile of v has arrived and is to be cleared;
    turn[w]: consumer w may issue products, or None."""

    q: Any
    q_ready: Any
    k: Ring
    v: Ring
    landed: Any
    turn: Any


class Steps(NamedTuple):
    """The blocks of keys in the order in which they are taken, each kind from its last on: masked ones behind the
    others, masked ones before them, and the others, which need no mask.

    high, masked, blocks     the first step behind each kind
    high_top, low_top, top   of each kind, the first key of step i, plus i * BLOCK_N
    """

    high: Any
    masked: Any
    blocks: Any
    high_top: Any
    low_top: Any
    top: Any


class Work(NamedTuple):
    """What all partitions get, most of it as in `attention_forward`.

    first_row, start_m   the program's first row in memory, and in its sequence
    row_base             its first row in [B, Hq, Sq]
    live, live_end       no row sees keys outside, but for those outside of the tensor, which load as zeros
    """

    q_descriptor: Any
    k_descriptor: Any
    v_descriptor: Any
    query_scale: Any
    key_scale: Any
    key_bias: Any
    scale: Any
    softcap: Any
    sinks_ptr: Any
    seen_ptr: Any
    results: Any
    shared: Shared
    steps: Steps
    view: View
    batch: Any
    head: Any
    group: Any
    first_row: Any
    first_key: Any
    start_m: Any
    row_base: Any
    live: Any
    live_end: Any


class Rows(NamedTuple):
    """Of a consumer's rows [ROWS]: their numbers, at most q_len - 1, the keys lo <= j < hi they see, |factor|."""

    offs: Any
    lo: Any
    hi: Any
    factor: Any


class State(NamedTuple):
    """From step to step: sums [ROWS, D], P that waits for its V, and m_i, l_i and spread of `online_softmax`."""

    acc: Any
    p: Any
    m_i: Any
    l_i: Any
    spread: Any


@gluon.jit(do_not_specialize=[*LENGTHS, "group"])
def attention_forward_hopper(
    q_descriptor,
    k_descriptor,
    v_descriptor,
    query_scale,
    key_scale,
    key_bias,
    key_lengths,
    key_ranges,
    q_starts,
    k_starts,
    seen_ptr,
    results,
    scale,
    softcap,
    sinks_ptr,
    left,
    right,
    q_len,
    k_len,
    q_heads,
    group,
    first_y,
    first_z,
    VALUE_DIM: gl.constexpr,
    BLOCK_M: gl.constexpr,
    BLOCK_N: gl.constexpr,
    STAGES: gl.constexpr,
    LANES: gl.constexpr,
):
    """`forward.attention_forward`, which states the formulas, the arguments and the grid.

    *_descriptor   Gluon's descriptors, with blocks [1, 1, ROWS, D] of q and [1, 1, BLOCK_N, D] of k and v
    BLOCK_M        ROWS of each of two or three consumers
    STAGES         tiles of k, and as many of v, in shared memory
    """
    CONSUMERS: gl.constexpr = BLOCK_M // ROWS
    block, head, sequence = program_in_section(q_heads, first_y, first_z, right is not None, LANES)
    packed_rows, packed_keys = q_len, k_len
    batch, first_row, first_key, q_len, k_len = sequence_bounds(sequence, q_len, k_len, q_starts, k_starts)
    start_m = block * BLOCK_M
    if q_starts is not None:
        if start_m >= q_len:
            return
    view = View(q_len, k_len, left, right, key_lengths, key_ranges)
    memory_row = first_row + start_m
    row_base = (batch.to(gl.int64) * q_heads + head.to(gl.int64)) * packed_rows + memory_row
    if seen_ptr is not None:
        seen_ptr += (batch.to(gl.int64) * (q_heads // group) + head // group) * k_len
    of_sides = View(q_len, k_len, left, right, key_lengths, None)
    live, _ = key_range(start_m * 0, batch, of_sides)
    _, live_end = key_range(q_len - 1, batch, of_sides)
    live_end = gl.where(first_key + live_end == packed_keys, 1 << 30, live_end)
    steps = _steps(start_m, gl.minimum(start_m + BLOCK_M, q_len) - 1, batch, view, BLOCK_N)

    q = gl.allocate_shared_memory(q_descriptor.dtype, [CONSUMERS] + q_descriptor.block_type.shape, q_descriptor.layout)
    q_ready = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    landed = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    mbarrier.init(q_ready, count=1)
    mbarrier.init(landed, count=1)
    turn = None  # Triton gives the memory of mbarriers that nobody uses to others
    if CONSUMERS == 2:
        turn = gl.allocate_shared_memory(gl.int64, [CONSUMERS, 1], mbarrier.MBarrierLayout())
        for i in gl.static_range(CONSUMERS):
            mbarrier.init(turn.index(i), count=1)
    k, v = _ring(k_descriptor, STAGES, CONSUMERS), _ring(v_descriptor, STAGES, CONSUMERS)
    fence_async_shared()
    work = Work(
        q_descriptor,
        k_descriptor,
        v_descriptor,
        query_scale,
        key_scale,
        key_bias,
        scale,
        softcap,
        sinks_ptr,
        seen_ptr,
        results,
        Shared(q, q_ready, k, v, landed, turn),
        steps,
        view,
        batch,
        head,
        group,
        memory_row,
        first_key,
        start_m,
        row_base,
        live,
        live_end,
    )
    # Warps and registers of the partitions behind the first, which has the launch's warps and what registers are left.
    if CONSUMERS == 2:
        gl.warp_specialize(
            [(_consume, (work, 0, VALUE_DIM)), (_consume, (work, 1, VALUE_DIM)), (_load, (work,))], [4, 4], [240, 24]
        )
    else:
        gl.warp_specialize(
            [
                (_consume, (work, 0, VALUE_DIM)),
                (_consume, (work, 1, VALUE_DIM)),
                (_consume, (work, 2, VALUE_DIM)),
                (_load, (work,)),
            ],
            [4, 4, 4],
            [160, 160, 24],
        )


@gluon.jit
def _steps(first, last, batch, view, BLOCK_N: gl.constexpr):
    """`Steps` of the rows first .. last: at least one, and the first one masked."""
    lo, hi = 0, 0
    if view.key_ranges is not None:
        offs = gl.arange(0, 256, layout=gl.BlockedLayout([1], [32], [4], [0]))
        lo, hi = key_range(gl.minimum(first + offs, last), batch, view)
    start, end, full_start, full_end = key_bounds(first, last, lo, hi, batch, view, BLOCK_N, False)
    high, low = gl.maximum(gl.cdiv(end - full_end, BLOCK_N), 0), full_start // BLOCK_N - start // BLOCK_N
    first_is_full = (high + low == 0).to(gl.int32)
    full_end = gl.maximum(full_end - first_is_full * BLOCK_N, full_start)
    high += first_is_full
    masked, full = high + low, (full_end - full_start) // BLOCK_N
    tops = (full_end + (high - 1) * BLOCK_N, full_start + (high - 1) * BLOCK_N, full_end + (masked - 1) * BLOCK_N)
    return Steps(high, masked, masked + full, tops[0], tops[1], tops[2])


@gluon.jit
def _first_key(steps, i, BLOCK_N: gl.constexpr):
    """The first key of step i."""
    return gl.where(i < steps.high, steps.high_top, gl.where(i < steps.masked, steps.low_top, steps.top)) - i * BLOCK_N


# ---- Tiles


@gluon.jit
def _ring(descriptor, STAGES: gl.constexpr, READERS: gl.constexpr):
    tiles = gl.allocate_shared_memory(descriptor.dtype, [STAGES] + descriptor.block_type.shape, descriptor.layout)
    ready = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(STAGES):
        mbarrier.init(ready.index(i), count=1)
        mbarrier.init(empty.index(i), count=READERS)
    return Ring(tiles, ready, empty)


@gluon.jit
def _load(work):
    """The loader. K(i) comes before V(i-1): step i takes both, and K(i-2) is released before V(i-3)."""
    q, q_ready = work.shared.q, work.shared.q_ready
    CONSUMERS: gl.constexpr = q.shape[0]
    mbarrier.expect(q_ready, CONSUMERS * work.q_descriptor.block_type.nbytes)
    for w in gl.static_range(CONSUMERS):
        load_tile(work.q_descriptor, [work.batch, work.head, work.first_row + w * ROWS, 0], q_ready, q.index(w))
    cleared = _fill(work.k_descriptor, work.shared.k, work, 0, 0, False)
    for i in range(1, work.steps.blocks):
        cleared = _fill(work.k_descriptor, work.shared.k, work, i, cleared, False)
        cleared = _fill(work.v_descriptor, work.shared.v, work, i - 1, cleared, True)
    _fill(work.v_descriptor, work.shared.v, work, work.steps.blocks - 1, cleared, True)


@gluon.jit
def _fill(descriptor, ring, work, i, cleared, CLEAR: gl.constexpr):
    """Load the tile of step i when its stage is empty. CLEAR: zeros for what no row sees, since 0 * NaN is NaN; returns
    how many tiles were `cleared`."""
    STAGES: gl.constexpr = ring.tiles.shape[0]
    BLOCK_N: gl.constexpr = ring.tiles.shape[3]
    tile, ready = ring.tiles.index(i % STAGES), ring.ready.index(i % STAGES)
    first_key = _first_key(work.steps, i, BLOCK_N)
    at = [work.batch, work.head // work.group, work.first_key + first_key, 0]
    mbarrier.wait(ring.empty.index(i % STAGES), (i // STAGES & 1) ^ 1)
    is_whole = i >= 0
    if CLEAR:
        is_whole = (first_key >= work.live) & (first_key + BLOCK_N <= work.live_end)
        if work.seen_ptr is not None:
            is_whole = i >= work.steps.masked
    if is_whole:
        mbarrier.expect(ready, descriptor.block_type.nbytes)
        load_tile(descriptor, at, ready, tile)
    else:
        mbarrier.expect(work.shared.landed, descriptor.block_type.nbytes)
        load_tile(descriptor, at, work.shared.landed, tile)
        mbarrier.wait(work.shared.landed, cleared & 1)
        _clear(tile.reshape([BLOCK_N, tile.shape[3]]), first_key, work)
        mbarrier.arrive(ready, count=1)
    return cleared + (1 - is_whole.to(gl.int32))


@gluon.jit
def _clear(tile, first_key, work):
    BLOCK_N: gl.constexpr = tile.shape[0]
    layout: gl.constexpr = row_layout(tile.shape[1])
    for j in gl.static_range(0, BLOCK_N, CLEARED_ROWS):
        part = tile.slice(j, CLEARED_ROWS)
        keys = first_key + j + gl.arange(0, CLEARED_ROWS, layout=gl.SliceLayout(1, layout))
        is_seen = (keys >= work.live) & (keys < work.live_end) & (keys < work.view.k_len)
        if work.seen_ptr is not None:
            is_seen = is_seen & (gl.load(work.seen_ptr + keys, mask=is_seen, other=0) != 0)
        values = part.load(layout)
        part.store(gl.where(is_seen[:, None], values, gl.zeros_like(values)))
    fence_async_shared()


@gluon.jit
def _take(ring, i):
    """The tile [BLOCK_N, D] of step i, once it is loaded."""
    STAGES: gl.constexpr = ring.tiles.shape[0]
    mbarrier.wait(ring.ready.index(i % STAGES), i // STAGES & 1)
    return ring.tiles.index(i % STAGES).reshape([ring.tiles.shape[3], ring.tiles.shape[4]])


@gluon.jit
def _release(ring, i):
    mbarrier.arrive(ring.empty.index(i % ring.tiles.shape[0]), count=1)


# ---- Consumers


@gluon.jit
def _consume(work, WG: gl.constexpr, VALUE_DIM: gl.constexpr):
    """A consumer: its rows, from q to the results."""
    shared, steps = work.shared, work.steps
    q = shared.q.index(WG).reshape([ROWS, shared.q.shape[4]])
    mbarrier.wait(shared.q_ready, 0)
    rows = _rows(q, work, WG)
    state = _first_step(q, rows, work)
    for i in range(1, steps.masked):
        state = _step(i, state, q, rows, work, WG, True)
    for i in range(steps.masked, steps.blocks):
        state = _step(i, state, q, rows, work, WG, False)
    acc = hopper.warpgroup_mma(state.p, _take(shared.v, steps.blocks - 1), state.acc, is_async=True)
    acc = warpgroup_mma_wait(0, deps=[acc])
    _store_rows(acc, state, rows, q, work, WG, VALUE_DIM)


@gluon.jit
def _rows(q, work, WG: gl.constexpr):
    """`Rows` of a consumer; the signs of their factors go into q, so that the largest product has the largest logit."""
    layout: gl.constexpr = gl.SliceLayout(1, product_layout(work.shared.k.tiles.shape[3]))
    offs = WG * ROWS + gl.arange(0, ROWS, layout=layout)
    factor = gl.full([ROWS], work.scale * LOG2_E, gl.float32, layout=layout)
    if work.query_scale is not None:
        pointers = vector_from(work.query_scale, work.batch, work.head, 0, work.first_row + offs)
        factor *= gl.load(pointers, mask=work.start_m + offs < work.view.q_len, other=0.0)
    if gl.min(factor, 0) < 0.0:
        of_tile: gl.constexpr = row_layout(q.shape[1])
        tile = q.load(of_tile)
        is_negative = gl.convert_layout(factor, gl.SliceLayout(1, of_tile)) < 0.0
        q.store(gl.where(is_negative[:, None], -tile, tile))
        fence_async_shared()
    factor = gl.abs(factor)
    if work.key_bias is None:
        factor = gl.where(factor == 0.0, TINY, factor)
    offs = gl.minimum(work.start_m + offs, work.view.q_len - 1)
    lo, hi = key_range(offs, work.batch, work.view)
    return Rows(offs, lo, hi, factor)


@gluon.jit
def _first_step(q, rows, work):
    """S(0), masked, and no product to run beside it."""
    BLOCK_N: gl.constexpr = work.shared.k.tiles.shape[3]
    D: gl.constexpr = work.shared.v.tiles.shape[4]
    logits = _issue_logits(q, _take(work.shared.k, 0), BLOCK_N)
    logits = warpgroup_mma_wait(0, deps=[logits])
    _release(work.shared.k, 0)
    m_i = gl.full([ROWS], float("-inf"), gl.float32, layout=rows.factor.type.layout)
    p, weighted, _, _, m_i = _softmax(0, logits, m_i, rows, work, True)
    acc = gl.zeros([ROWS, D], gl.float32, layout=product_layout(D))
    left: gl.constexpr = gl.DotOperandLayout(operand_index=0, parent=product_layout(D), k_width=2)
    p_tile = gl.convert_layout(p.to(work.v_descriptor.dtype), left)
    return State(acc, p_tile, m_i, partial_sums(p, SUM_COLUMNS), partial_sums(weighted, SUM_COLUMNS))


@gluon.jit
def _step(i, state, q, rows, work, WG: gl.constexpr, MASKED: gl.constexpr):
    shared = work.shared
    k = _take(shared.k, i)
    if shared.turn is not None:
        mbarrier.wait(shared.turn.index(WG), (i & 1) if WG == 0 else (i & 1) ^ 1)
    logits = _issue_logits(q, k, k.shape[0])
    acc = hopper.warpgroup_mma(state.p, _take(shared.v, i - 1), state.acc, is_async=True)
    if shared.turn is not None:
        mbarrier.arrive(shared.turn.index((WG + 1) % shared.turn.shape[0]), count=1)
    logits = warpgroup_mma_wait(1, deps=[logits])
    _release(shared.k, i)
    p, weighted, alpha, moved, m_i = _softmax(i, logits, state.m_i, rows, work, MASKED)
    of_sums: gl.constexpr = gl.SliceLayout(1, state.l_i.type.layout)
    moves = gl.convert_layout(alpha, of_sums), gl.convert_layout(moved, of_sums)
    entropy: gl.constexpr = work.results.entropy is not None
    l_i, spread = moved_sums(p, weighted, moves[0], moves[1], state.l_i, state.spread, entropy)
    acc = warpgroup_mma_wait(0, deps=[acc])
    _release(shared.v, i - 1)
    acc *= gl.convert_layout(alpha, gl.SliceLayout(1, acc.type.layout))[:, None]
    return State(acc, gl.convert_layout(p.to(work.v_descriptor.dtype), state.p.type.layout), m_i, l_i, spread)


@gluon.jit
def _issue_logits(q, k, BLOCK_N: gl.constexpr):
    none = gl.zeros([ROWS, BLOCK_N], gl.float32, layout=product_layout(BLOCK_N))
    return hopper.warpgroup_mma(q, k.permute((1, 0)), none, use_acc=False, is_async=True)


@gluon.jit
def _softmax(i, logits, m_i, rows, work, MASKED: gl.constexpr):
    """`probabilities` of step i from products of q and k."""
    first_key = _first_key(work.steps, i, logits.shape[1]) if MASKED else work.steps.top - i * logits.shape[1]
    columns = gl.arange(0, logits.shape[1], layout=gl.SliceLayout(0, logits.type.layout))
    exists = first_key + columns < work.view.k_len if MASKED else None
    keep, bias = None, None
    if MASKED:
        keep = visible(rows.offs, first_key + columns, rows.lo, rows.hi, work.batch, work.head, work.view, None)
    if work.key_scale is not None:
        key = work.first_key + first_key  # a scalar first: columns are then immediate offsets
        pointers = vector_from(work.key_scale, work.batch, work.head // work.group, 0, key) + columns * work.key_scale.s
        logits *= gl.load(pointers, mask=exists)[None, :]
    if work.key_bias is not None:
        kv_head, of_group = work.head // work.group, work.head % work.group
        pointers = vector_from(work.key_bias, work.batch, kv_head, of_group, work.first_key + first_key)
        bias = (gl.load(pointers + columns * work.key_bias.s, mask=exists) * LOG2_E)[None, :]
    entropy: gl.constexpr = work.results.entropy is not None
    return probabilities(logits, bias, keep, rows.factor, work.softcap, m_i, MASKED, entropy)


@gluon.jit
def _store_rows(acc, state, rows, q, work, WG: gl.constexpr, VALUE_DIM: gl.constexpr):
    """All results of a consumer's rows; its q takes the output on the way."""
    layout: gl.constexpr = gl.SliceLayout(1, state.l_i.type.layout)
    offs = WG * ROWS + gl.arange(0, ROWS, layout=layout)
    m_i, factor = gl.convert_layout(state.m_i, layout), gl.convert_layout(rows.factor, layout)
    results, offsets, keep = work.results, work.row_base + offs, work.start_m + offs < work.view.q_len
    _, weight, total = finish_softmax(
        m_i, state.l_i, state.spread, factor, work.softcap, work.sinks_ptr, work.head, results, offsets, keep
    )
    of_rows: gl.constexpr = gl.SliceLayout(1, acc.type.layout)
    out = acc / gl.convert_layout(total, of_rows)[:, None]
    if work.sinks_ptr is not None:
        out *= gl.convert_layout(weight, of_rows)[:, None]
    rounded = out.to(work.q_descriptor.dtype)
    _store_tile(results.out, rounded, q, work, WG, VALUE_DIM)
    if results.rounding is not None:
        lost = lost_in_rounding(out, rounded).to(gl.int16).to(rounded.dtype, bitcast=True)
        _store_tile(results.rounding, lost, q, work, WG, VALUE_DIM)


@gluon.jit
def _store_tile(result, values, memory, work, WG: gl.constexpr, VALUE_DIM: gl.constexpr):
    """Store values [ROWS, D], those of rows and columns that exist; where `result` is int8, their bits of int16."""
    layout: gl.constexpr = row_layout(values.shape[1])
    rows = WG * ROWS + gl.arange(0, ROWS, layout=gl.SliceLayout(1, layout))
    columns = gl.arange(0, values.shape[1], layout=gl.SliceLayout(0, layout))
    keep = (work.start_m + rows < work.view.q_len)[:, None] & (columns < VALUE_DIM)[None, :]
    memory.store(values)
    values = memory.load(layout)
    if result.dtype.element_ty == gl.int8:
        values = values.to(gl.int16, bitcast=True).to(gl.int8)
    pointers = result + (work.row_base + rows).to(gl.int64)[:, None] * VALUE_DIM + columns[None, :]
    gl.store(pointers, values, mask=keep)


@gluon.constexpr_function
def product_layout(columns):
    """Of a consumer's product [ROWS, columns]."""
    return gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, columns, 16])


@gluon.constexpr_function
def row_layout(columns):
    """Of a tile [rows, columns] whose lanes hold 16 bytes of a row."""
    lanes = min(columns // 8, 32)
    return gl.BlockedLayout([1, 8], [32 // lanes, lanes], [4, 1], [1, 0])


# ---- Launch


class _Descriptor(TensorDescriptor):
    """A descriptor of an aligned tensor, which leaves nothing to check."""

    def __post_init__(self) -> None:
        pass


@functools.cache
def _layout(width: int) -> gl.NVMMASharedLayout:
    """Of a block whose rows have this width; how many there are does not matter."""
    return gl.NVMMASharedLayout.get_default_for([1, 1, ROWS.value, width], gl.bfloat16)


def _described(tensor: Tensor, shape: list[int], strides: list[int], block: list[int]) -> TensorDescriptor:
    return _Descriptor(tensor, shape, strides, block, _layout(block[3]))


VARIANT = Variant(attention_forward_hopper, _described, ROWS.value)
