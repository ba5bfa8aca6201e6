"""Addresses: tiles and vectors of a tensor from one row of one head on, packed sequences, and pages."""

from __future__ import annotations

import triton
import triton.language as tl

from .primitives import load_tile, tile_offsets
from .records import MemberPages, Place, Scale, Strided


@triton.jit
def begin(x, batch, head, row):
    """The `Strided` of x from one (batch entry, head) and row on."""
    batch, head, row = tl.cast(batch, tl.int64), tl.cast(head, tl.int64), tl.cast(row, tl.int64)
    return Strided(x.ptr + (batch * x.b + head * x.h + row * x.s), x.b, x.h, x.s, x.d)


@triton.jit
def tile_at(x, batch, head, row, ROWS: tl.constexpr, COLUMNS: tl.constexpr, WIDE: tl.constexpr):
    """Pointers to the tile of x, a `Strided`, from one (batch entry, head) and row on; offsets are int64 where WIDE."""
    return begin(x, batch, head, row).ptr + tile_offsets(ROWS, COLUMNS, x.s, x.d, WIDE)


@triton.jit
def contiguous_tile(ptr, row, ROWS: tl.constexpr, COLUMNS: tl.constexpr, WIDTH: tl.constexpr):
    """Pointers to the tile from a row on; rows are contiguous and WIDTH long.

    Its offsets have 32 bits: with 64, kernels that use them before and after a loop hold them in registers through it.
    """
    return ptr + row * WIDTH + tile_offsets(ROWS, COLUMNS, WIDTH, 1, False)


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
def begin_seen(ptr, place, k_len):
    """Pointer to the flag of a member's first key in [B, Hkv, k_len], contiguous."""
    return ptr + (place.batch.to(tl.int64) * (place.q_heads // place.group) + place.kv_head) * k_len


@triton.jit
def load_factors(x, keep):
    """The factors of a `Scale` from its first on, one for each member of keep, 0 where that is False."""
    COUNT: tl.constexpr = keep.shape[0]
    return tl.load(x.ptr + tl.arange(0, COUNT).to(tl.int64) * x.s, mask=keep, other=0.0)


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
def place_of_member(member, head, kv_head, q_heads, group, q_len, k_len, starts):
    """(Place, rows, keys) of batch entry or packed sequence `member`; starts is a `Starts` or None."""
    batch, first_row, first_key = member, member * 0, member * 0
    if starts is not None:
        first_row, first_key = tl.load(starts.q + member), tl.load(starts.k + member)
        q_len = tl.load(starts.q + member + 1) - first_row
        k_len = tl.load(starts.k + member + 1) - first_key
        batch = member * 0
    return Place(batch, head, kv_head, q_heads, group, member, first_row, first_key), q_len, k_len
