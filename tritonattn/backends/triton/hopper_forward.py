"""Forward kernel of sm_90 in Gluon: as `forward`, with softmax under the products of other warpgroups.

A program has two or three warpgroups that consume, 64 rows each, and one that loads. A consumer issues S(i) = Q K(i)^T
and P(i-1) V(i-1) together and takes softmax(i) while the tensor cores work on the second and on other consumers'
products; two consumers take turns. Shape: Shah et al. 2024, arXiv:2407.08608.
"""

# pyright: reportAttributeAccessIssue=false, reportCallIssue=false
from __future__ import annotations

import functools
from collections import namedtuple

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia import hopper
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier, warpgroup_mma_wait
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from .block import LENGTHS, program_in_section, sequence_bounds, vector_from
from .launch import Variant
from .pairs import key_bounds, key_range
from .records import View
from .softmax import LOG2_E, TINY, finish_softmax, lost_in_rounding, moved_sums, partial_sums, probabilities

ROWS = gl.constexpr(64)  # of a consumer
SUM_COLUMNS = CLEARED_ROWS = gl.constexpr(8)  # none needs another lane's sum; a loader's thread has 24 registers
load_tile = getattr(hopper.tma, "async_load", None) or hopper.tma.async_copy_global_to_shared  # before triton 3.8
# k or v: tiles [STAGES, 1, 1, BLOCK_N, D], and for each the mbarriers ready (is loaded) and empty (is used). Behind the
# last stage's, ready may have one more: a tile that is to be cleared has arrived.
Ring = namedtuple("Ring", "tiles ready empty")
# q: tiles [consumers, 1, 1, ROWS, D], later of the output; turn[w]: consumer w may issue products, or None.
Shared = namedtuple("Shared", "q q_ready k v turn")
# Blocks of keys, each part from its last on: masked ones behind the others up to step `high`, masked ones before them
# up to `masked`, others, of `full` keys, up to `blocks`. Step i begins with key top - i * BLOCK_N, but for jumps.
Steps = namedtuple("Steps", "high masked blocks top full")
# first_row, first_key: in memory, of the program and of its sequence; start: the program's first row in the sequence,
# `rows` of them from there on. Keys outside of [live, live_end) are hidden from all rows of the sequence.
Position = namedtuple("Position", "batch head kv_head of_group first_row first_key start rows live live_end")
# seen: pointer to the sequence's first key; row: the program's first one in [B, Hq, Sq].
Work = namedtuple("Work", "q_desc k_desc v_desc position terms scale softcap sinks view steps shared seen results row")
# The visible keys lo <= j < hi of a consumer's rows [ROWS], and |factor|.
Rows = namedtuple("Rows", "lo hi factor")
# From step to step: sums [ROWS, D], P [ROWS, BLOCK_N] that waits for its V, and m_i, l_i and spread of the softmax.
State = namedtuple("State", "acc p m_i l_i spread")


@gluon.jit(do_not_specialize=[*LENGTHS, "group"])
def attention_forward_hopper(
    q_descriptor,
    k_descriptor,
    v_descriptor,
    terms,
    masks,
    results,
    scale,
    softcap,
    sinks,
    left,
    right,
    q_len,
    k_len,
    q_heads,
    group,
    first_head,
    first_y,
    first_z,
    VALUE_DIM: gl.constexpr,
    BLOCK_M: gl.constexpr,
    BLOCK_N: gl.constexpr,
    STAGES: gl.constexpr,
    NUM_XCDS: gl.constexpr,
):
    """`forward.attention_forward`, which states formulas, arguments and grid, by BLOCK_M / ROWS consumers. Gluon's
    descriptors have blocks [1, 1, ROWS, D] of q and [1, 1, BLOCK_N, D] of k and v; there is room for STAGES of each."""
    CONSUMERS: gl.constexpr = BLOCK_M // ROWS
    NARROWED: gl.constexpr = masks.key_lengths is not None or masks.key_ranges is not None
    CLEARS: gl.constexpr = NARROWED or left is not None or masks.q_starts is not None
    LOADERS: gl.constexpr = 4 if CLEARS else 1  # warps
    block, head, sequence = program_in_section(q_heads, first_head, first_y, first_z, right is not None, NUM_XCDS)
    if sequence < 0:
        return
    packed_rows, kv_head, start = q_len, head // group, block * BLOCK_M
    batch, first_row, first_key, q_len, k_len = sequence_bounds(sequence, q_len, k_len, masks.q_starts, masks.k_starts)
    if start >= q_len:  # of a shorter sequence
        return
    view = View(q_len, k_len, left, right, masks.key_lengths, masks.key_ranges)
    of_sides = View(q_len, k_len, left, right, masks.key_lengths, None)
    live, live_end = key_range(start * 0, batch, of_sides)[0], key_range(q_len - 1, batch, of_sides)[1]
    first_row += start
    steps = _steps(start, gl.minimum(start + BLOCK_M, q_len) - 1, batch, view, BLOCK_N)
    seen_ptr = masks.seen
    if masks.seen is not None:
        seen_ptr += (batch.to(gl.int64) * (q_heads // group) + kv_head) * k_len
    row = (batch.to(gl.int64) * q_heads + head) * packed_rows + first_row
    position = Position(batch, head, kv_head, head % group, first_row, first_key, start, q_len - start, live, live_end)
    shared = _shared(q_descriptor, k_descriptor, v_descriptor, STAGES, CONSUMERS, CLEARS)
    descriptors = q_descriptor, k_descriptor, v_descriptor
    work = Work(*descriptors, position, terms, scale, softcap, sinks, view, steps, shared, seen_ptr, results, row)
    # Warps and registers of the partitions behind the first, which has the launch's warps and what registers are left.
    DV: gl.constexpr = VALUE_DIM
    if CONSUMERS == 2:
        gl.warp_specialize(
            [(_consume, (work, 0, DV)), (_consume, (work, 1, DV)), (_load, (work,))], [4, LOADERS], [240, 24]
        )
    else:
        gl.warp_specialize(
            [(_consume, (work, 0, DV)), (_consume, (work, 1, DV)), (_consume, (work, 2, DV)), (_load, (work,))],
            [4, 4, LOADERS],
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
    first_block, end_block = start // BLOCK_N, gl.cdiv(end, BLOCK_N)
    blocks, high = gl.maximum(end_block - first_block, 1), gl.maximum(end_block - full_end // BLOCK_N, 1)
    full = gl.maximum(end_block - full_start // BLOCK_N - high, 0)
    return Steps(high, blocks - full, blocks, (first_block + blocks - 1) * BLOCK_N, full * BLOCK_N)


@gluon.jit
def _first_key(i, steps, view, BLOCK_N: gl.constexpr):
    key = steps.top - i * BLOCK_N
    if view.left is not None or view.key_ranges is not None:  # masked blocks before others jump over these, and back
        before = (steps.masked - steps.high) * BLOCK_N
        key += gl.where(i < steps.high, 0, gl.where(i < steps.masked, -steps.full, before))
    return key


@gluon.jit
def _barriers(COUNT: gl.constexpr, ARRIVALS: gl.constexpr):
    barriers = gl.allocate_shared_memory(gl.int64, [COUNT, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(COUNT):
        mbarrier.init(barriers.index(i), count=ARRIVALS)
    return barriers


@gluon.jit
def _shared(q_desc, k_desc, v_desc, STAGES: gl.constexpr, CONSUMERS: gl.constexpr, CLEARS: gl.constexpr):
    q = gl.allocate_shared_memory(q_desc.dtype, [CONSUMERS] + q_desc.block_type.shape, q_desc.layout)  # noqa: RUF005
    k = gl.allocate_shared_memory(k_desc.dtype, [STAGES] + k_desc.block_type.shape, k_desc.layout)  # noqa: RUF005
    v = gl.allocate_shared_memory(v_desc.dtype, [STAGES] + v_desc.block_type.shape, v_desc.layout)  # noqa: RUF005
    turn = _barriers(CONSUMERS, 1) if CONSUMERS == 2 else None  # mbarriers that nobody uses share their memory
    of_k = Ring(k, _barriers(STAGES, 1), _barriers(STAGES, CONSUMERS))
    of_v = Ring(v, _barriers(STAGES + CLEARS, 1), _barriers(STAGES, CONSUMERS))
    shared = Shared(q, _barriers(1, 1), of_k, of_v, turn)
    fence_async_shared()
    return shared


@gluon.jit
def _load(work):
    """Load q, then K(i) before V(i-1): step i takes both, and K(i-2) is released before V(i-3)."""
    q, q_ready, position = work.shared.q, work.shared.q_ready.index(0), work.position
    CONSUMERS: gl.constexpr = q.shape[0]
    mbarrier.expect(q_ready, CONSUMERS * work.q_desc.block_type.nbytes)
    for w in gl.static_range(CONSUMERS):
        row = position.first_row + w * ROWS
        load_tile(work.q_desc, [position.batch, position.head, row, 0], q_ready, q.index(w))
    _fill(work.k_desc, work.shared.k, work, 0, 0)
    cleared = 0
    for i in range(1, work.steps.blocks):
        _fill(work.k_desc, work.shared.k, work, i, 0)
        cleared = _fill(work.v_desc, work.shared.v, work, i - 1, cleared)
    _fill(work.v_desc, work.shared.v, work, work.steps.blocks - 1, cleared)


@gluon.jit
def _fill(descriptor, ring, work, i, cleared):
    """Load the tile of step i when its stage is empty; return how many tiles were cleared of NaN in hidden keys."""
    STAGES: gl.constexpr = ring.tiles.shape[0]
    BLOCK_N: gl.constexpr = ring.tiles.shape[3]
    CLEARS: gl.constexpr = ring.ready.shape[0] > STAGES
    position, tile, stage = work.position, ring.tiles.index(i % STAGES), i % STAGES
    first_key = _first_key(i, work.steps, work.view, BLOCK_N)
    mbarrier.wait(ring.empty.index(stage), (i // STAGES & 1) ^ 1)
    arrives_at = stage
    if CLEARS:
        is_dirty = (first_key < position.live) | (first_key + BLOCK_N > position.live_end)
        if work.seen is not None:
            is_dirty = i < work.steps.masked
        arrives_at = gl.where(is_dirty, STAGES, stage)
    mbarrier.expect(ring.ready.index(arrives_at), descriptor.block_type.nbytes)
    at = [position.batch, position.kv_head, position.first_key + first_key, 0]
    load_tile(descriptor, at, ring.ready.index(arrives_at), tile)
    if CLEARS:
        if is_dirty:
            mbarrier.wait(ring.ready.index(STAGES), cleared & 1)
            _clear(tile.reshape([BLOCK_N, tile.shape[3]]), first_key, work)
            mbarrier.arrive(ring.ready.index(stage), count=1)
        cleared += is_dirty.to(gl.int32)
    return cleared


@gluon.jit
def _clear(tile, first_key, work):
    BLOCK_N: gl.constexpr = tile.shape[0]
    layout: gl.constexpr = row_layout(tile.shape[1])
    for j in gl.static_range(0, BLOCK_N, CLEARED_ROWS):
        part = tile.slice(j, CLEARED_ROWS)
        keys = first_key + j + gl.arange(0, CLEARED_ROWS, layout=gl.SliceLayout(1, layout))
        is_seen = (keys >= work.position.live) & (keys < work.position.live_end)
        if work.seen is not None:
            is_seen = is_seen & (gl.load(work.seen + keys, mask=is_seen, other=0) != 0)
        values = part.load(layout)  # [CLEARED_ROWS, D]
        part.store(gl.where(is_seen[:, None], values, gl.zeros_like(values)))
    fence_async_shared()


@gluon.jit
def _take(ring, i):
    """The tile [BLOCK_N, D] of step i, once it is loaded."""
    STAGES: gl.constexpr = ring.tiles.shape[0]
    mbarrier.wait(ring.ready.index(i % STAGES), i // STAGES & 1)
    return ring.tiles.index(i % STAGES).reshape([ring.tiles.shape[3], ring.tiles.shape[4]])


@gluon.jit
def _consume(work, WG: gl.constexpr, VALUE_DIM: gl.constexpr):
    """Take a consumer's rows from q to the results."""
    shared, steps, view = work.shared, work.steps, work.view
    q = shared.q.index(WG).reshape([ROWS, shared.q.shape[4]])  # [ROWS, D]
    mbarrier.wait(shared.q_ready.index(0), 0)
    rows = _rows(q, work, WG)
    state = _first_step(q, rows, work)
    if view.left is not None or view.right is not None or view.key_ranges is not None:  # others mask one step
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
    terms, position = work.terms, work.position
    layout: gl.constexpr = gl.SliceLayout(1, product_layout(work.shared.k.tiles.shape[3]))
    offs = WG * ROWS + gl.arange(0, ROWS, layout=layout)  # [ROWS]
    factor = gl.full([ROWS], work.scale * LOG2_E, gl.float32, layout=layout)  # [ROWS]
    if terms.query_scale is not None:
        pointers = vector_from(terms.query_scale, position.batch, position.head, 0, position.first_row + offs)
        factor *= gl.load(pointers, mask=offs < position.rows, other=0.0)
    if gl.min(factor, 0) < 0.0:
        of_tile: gl.constexpr = row_layout(q.shape[1])
        tile = q.load(of_tile)  # [ROWS, D]
        is_negative = gl.convert_layout(factor, gl.SliceLayout(1, of_tile)) < 0.0
        q.store(gl.where(is_negative[:, None], -tile, tile))
        fence_async_shared()
    factor = gl.abs(factor)
    if terms.key_bias is None:
        factor = gl.where(factor == 0.0, TINY, factor)
    lo, hi = key_range(position.start + gl.minimum(offs, position.rows - 1), position.batch, work.view)
    return Rows(lo, hi, factor)


@gluon.jit
def _first_step(q, rows, work):
    """`State` after S(0), which is masked and has no other product to run with it."""
    BLOCK_N: gl.constexpr = work.shared.k.tiles.shape[3]
    D: gl.constexpr = work.shared.v.tiles.shape[4]
    logits = gl.zeros([ROWS, BLOCK_N], gl.float32, layout=product_layout(BLOCK_N))  # [ROWS, BLOCK_N]
    k = _take(work.shared.k, 0).permute((1, 0))  # [D, BLOCK_N]
    logits = hopper.warpgroup_mma(q, k, logits, use_acc=False, is_async=True)
    logits = warpgroup_mma_wait(0, deps=[logits])
    mbarrier.arrive(work.shared.k.empty.index(0), count=1)
    m_i = gl.full([ROWS], float("-inf"), gl.float32, layout=rows.factor.type.layout)  # [ROWS]
    p, weighted, _, _, m_i = _softmax(0, logits, m_i, rows, work, True)
    acc = gl.zeros([ROWS, D], gl.float32, layout=product_layout(D))  # [ROWS, D]
    left: gl.constexpr = gl.DotOperandLayout(operand_index=0, parent=product_layout(D), k_width=2)
    p_tile = gl.convert_layout(p.to(work.v_desc.dtype), left)  # [ROWS, BLOCK_N]
    return State(acc, p_tile, m_i, partial_sums(p, SUM_COLUMNS), partial_sums(weighted, SUM_COLUMNS))


@gluon.jit
def _step(i, state, q, rows, work, WG: gl.constexpr, MASKED: gl.constexpr):
    """`State` after S(i) and P(i-1) V(i-1), issued together, and softmax(i) under the second and others' products."""
    shared = work.shared
    STAGES: gl.constexpr = shared.k.tiles.shape[0]
    BLOCK_N: gl.constexpr = shared.k.tiles.shape[3]
    k = _take(shared.k, i).permute((1, 0))  # [D, BLOCK_N]
    logits = gl.zeros([ROWS, BLOCK_N], gl.float32, layout=product_layout(BLOCK_N))  # [ROWS, BLOCK_N]
    if shared.turn is not None:
        mbarrier.wait(shared.turn.index(WG), (i & 1) if WG == 0 else (i & 1) ^ 1)
    logits = hopper.warpgroup_mma(q, k, logits, use_acc=False, is_async=True)
    acc = hopper.warpgroup_mma(state.p, _take(shared.v, i - 1), state.acc, is_async=True)
    if shared.turn is not None:
        mbarrier.arrive(shared.turn.index((WG + 1) % shared.turn.shape[0]), count=1)
    logits = warpgroup_mma_wait(1, deps=[logits])
    mbarrier.arrive(shared.k.empty.index(i % STAGES), count=1)
    p, weighted, alpha, moved, m_i = _softmax(i, logits, state.m_i, rows, work, MASKED)
    of_sums: gl.constexpr = gl.SliceLayout(1, state.l_i.type.layout)
    moves = gl.convert_layout(alpha, of_sums), gl.convert_layout(moved, of_sums)
    entropy = work.results.entropy is not None
    l_i, spread = moved_sums(p, weighted, moves[0], moves[1], state.l_i, state.spread, entropy)
    acc = warpgroup_mma_wait(0, deps=[acc])
    mbarrier.arrive(shared.v.empty.index((i - 1) % STAGES), count=1)
    acc *= gl.convert_layout(alpha, gl.SliceLayout(1, acc.type.layout))[:, None]
    return State(acc, gl.convert_layout(p.to(work.v_desc.dtype), state.p.type.layout), m_i, l_i, spread)


@gluon.jit
def _softmax(i, logits, m_i, rows, work, MASKED: gl.constexpr):
    terms, position, BLOCK_N = work.terms, work.position, logits.shape[1]
    first_key = _first_key(i, work.steps, work.view, BLOCK_N)
    columns = gl.arange(0, logits.shape[1], layout=gl.SliceLayout(0, logits.type.layout))
    exists, keep, bias = None, None, None
    if MASKED:
        exists, keep = columns < work.view.k_len - first_key, _visible(logits, first_key, rows, work.view)
    memory_key = position.first_key + first_key
    if terms.key_scale is not None:
        first = vector_from(terms.key_scale, position.batch, position.kv_head, 0, memory_key)
        logits *= gl.load(first + columns.to(gl.int64) * terms.key_scale.s, mask=exists)[None, :]
    if terms.key_bias is not None:
        first = vector_from(terms.key_bias, position.batch, position.kv_head, position.of_group, memory_key)
        bias = (gl.load(first + columns.to(gl.int64) * terms.key_bias.s, mask=exists) * LOG2_E)[None, :]
    entropy = work.results.entropy is not None
    return probabilities(logits, bias, keep, rows.factor, work.softcap, terms, m_i, MASKED, entropy)


@gluon.jit
def _visible(logits, first_key, rows, view):
    """`block.visible` in Gluon. The eighth is an immediate: as a number of a column it would take a register."""
    eights = logits.reshape([ROWS, logits.shape[1] // 8, 8])
    of_rows: gl.constexpr = gl.SliceLayout(1, gl.SliceLayout(2, eights.type.layout))
    eighth = 8 * gl.arange(0, eights.shape[1], layout=gl.SliceLayout(0, gl.SliceLayout(2, eights.type.layout)))
    within = gl.arange(0, 8, layout=gl.SliceLayout(0, gl.SliceLayout(1, eights.type.layout)))[None, :]
    hi = gl.convert_layout(rows.hi - first_key, of_rows)
    keep = eighth[None, :][:, :, None] < (hi[:, None][:, :, None] - within[:, None, :])
    if view.left is not None or view.key_ranges is not None:
        lo = gl.convert_layout(rows.lo - first_key, of_rows)
        keep = keep & (eighth[None, :][:, :, None] >= (lo[:, None][:, :, None] - within[:, None, :]))
    return gl.convert_layout(keep.reshape(logits.shape), logits.type.layout)


@gluon.jit
def _store_rows(acc, state, rows, q, work, WG: gl.constexpr, VALUE_DIM: gl.constexpr):
    """Store all results of a consumer's rows; the memory of its q takes the output on the way."""
    layout: gl.constexpr = gl.SliceLayout(1, state.l_i.type.layout)
    offs = WG * ROWS + gl.arange(0, ROWS, layout=layout)  # [ROWS]
    m_i, factor = gl.convert_layout(state.m_i, layout), gl.convert_layout(rows.factor, layout)
    results, at, keep = work.results, work.row + offs, offs < work.position.rows
    cap, terms, sinks, position = work.softcap, work.terms, work.sinks, work.position
    batch, head, memory_rows = position.batch, position.head, position.first_row + offs
    _, weight, total = finish_softmax(
        m_i, state.l_i, state.spread, factor, cap, terms, sinks, batch, head, memory_rows, results, at, keep
    )
    of_rows: gl.constexpr = gl.SliceLayout(1, acc.type.layout)
    out = acc / gl.convert_layout(total, of_rows)[:, None]  # [ROWS, D]
    if sinks is not None:
        out *= gl.convert_layout(weight, of_rows)[:, None]
    rounded = out.to(work.q_desc.dtype)
    _store_tile(results.out, rounded, q, work, WG, VALUE_DIM)
    if results.rounding is not None:
        lost = lost_in_rounding(out, rounded).to(gl.int16).to(rounded.dtype, bitcast=True)
        _store_tile(results.rounding, lost, q, work, WG, VALUE_DIM)


@gluon.jit
def _store_tile(result, values, memory, work, WG: gl.constexpr, VALUE_DIM: gl.constexpr):
    """Store the rows and columns of values [ROWS, D] that exist; where `result` is int8, their bits of int16."""
    layout: gl.constexpr = row_layout(values.shape[1])
    offs = WG * ROWS + gl.arange(0, ROWS, layout=gl.SliceLayout(1, layout))
    columns = gl.arange(0, values.shape[1], layout=gl.SliceLayout(0, layout))
    memory.store(values)
    values = memory.load(layout)
    if result.dtype.element_ty == gl.int8:
        values = values.to(gl.int16, bitcast=True).to(gl.int8)
    keep = (offs < work.position.rows)[:, None] & (columns < VALUE_DIM)[None, :]
    gl.store(result + work.row * VALUE_DIM + offs[:, None] * VALUE_DIM + columns[None, :], values, mask=keep)


@gluon.constexpr_function
def product_layout(columns):  # of a consumer's product [ROWS, columns]
    return gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, columns, 16])


@gluon.constexpr_function
def row_layout(columns):  # of a tile [rows, columns] whose lanes hold 16 bytes of a row
    lanes = min(columns // 8, 32)
    return gl.BlockedLayout([1, 8], [32 // lanes, lanes], [4, 1], [1, 0])


class _Descriptor(TensorDescriptor):  # of an aligned tensor, which leaves nothing to check
    def __post_init__(self) -> None:
        pass


_layout = functools.cache(lambda width: gl.NVMMASharedLayout.get_default_for([1, 1, ROWS.value, width], gl.bfloat16))
VARIANT = Variant(attention_forward_hopper, lambda *tile: _Descriptor(*tile, _layout(tile[3][3])), ROWS.value)
