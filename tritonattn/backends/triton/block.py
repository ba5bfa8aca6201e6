"""Device functions that kernels share: programs, addresses, tiles.

Names: `offs_*` are vectors of indices, `*_ptr` pointers, CAPITALS constexprs. `pairs` has the device functions of
pairs of a row and a key, `softmax` the arithmetic.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ...tuning import config
from .records import Strided

ROW_TERMS_ALIGNMENT = tl.constexpr(config.ROW_TERMS_ALIGNMENT)


def _of_bytes(kind: str, shift: int, factor: int) -> tl.constexpr:
    """PTX from four bytes of e4m3 to four numbers of 16 bits: 3 instructions each, where Triton's integers take 10.

    Bits shift into a number that is too small by 2^(difference of the exponents' biases), the factor; 0x7F is NaN. Pure
    code Triton would move behind the layout of a product, where warps convert what others do: the forward of sm_80 at
    D 128 would have four times the instructions (static, triton 3.9).
    """
    mask, lines = (0x7F00 >> shift) * 0x10001, []
    for out, (bytes_, signs) in enumerate(((0x1404, 0x9988), (0x3424, 0xBBAA))):
        lines += [
            f"prmt.b32 x, $2, 0, {bytes_:#x}; prmt.b32 m, n, 0, {signs:#x}; shr.u32 y, x, {shift};",
            f"and.b32 y, y, {mask:#x}; and.b32 x, x, 0x80008000; or.b32 x, x, m; or.b32 x, x, y;",
            f"fma.rn.{kind}x2 ${out}, x, f, z;",
        ]
    head = "and.b32 n, $2, 0x7f7f7f7f; add.u32 n, n, 0x01010101; and.b32 n, n, 0x80808080;"
    head += f" mov.b32 f, {factor * 0x10001:#x}; mov.b32 z, 0x80008000;"
    return tl.constexpr("\n".join(["{ .reg .b32 n, m, x, y, f, z;", head, *lines, "}"]))


OF_BYTES_BF16, OF_BYTES_FP16 = _of_bytes("bf16", 4, 0x7B80), _of_bytes("f16", 1, 0x5C00)

# Arguments whose values change from call to call: compiled code does not depend on them.
LENGTHS = (
    "q_len k_len terms_len addends_len bounds_len capacity key_block q_heads kv_heads left right extent relative_right "
    "keep_from first_head first_y first_z splits part_rows"
).split()


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
def program_in_section(heads, first_head, first_y, first_z, LAST_FIRST: tl.constexpr, NUM_XCDS: tl.constexpr):
    """(block, head, sequence) of this program of the grid (size of a section, blocks, sections): `tuning.order`.

    Programs start along the grid's first axis, then the second: all heads of a section take their longest block first,
    under a causal mask the last one. Sections cut the heads of all sequences, `heads` of each. Where they do not
    divide, the first section has fewer, and a program without a head gets the sequence -1.

    first_head   where the first section would begin if it were full, at most 0
    NUM_XCDS     dies to which the hardware deals programs in turn, a divisor of the section's size. As many heads as it
                 divides stay on one die each, neighbours on the same; blocks of the others go to the dies in turn
    """
    size, die, slot = tl.num_programs(0), tl.program_id(0) % NUM_XCDS, tl.program_id(0) // NUM_XCDS
    first, step = first_head + (first_z + tl.program_id(2)) * size, tl.program_id(1)
    count = tl.minimum(first + size, size)  # heads of the section
    of_die, shared = count // NUM_XCDS, count % NUM_XCDS
    turn = (die + step * shared) % NUM_XCDS
    has_head = (slot < of_die) | ((slot == of_die) & (turn < shared))
    slot = tl.where(slot < of_die, die * of_die + slot, NUM_XCDS * of_die + turn)
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
def load_tile(pointers, keep_row, WIDTH: tl.constexpr, DTYPE: tl.constexpr = None):
    """A tile [ROWS, COLUMNS], 0 in rows that keep_row drops and in columns from WIDTH on.

    DTYPE   numbers of 8 bits become such ones: fp8e4nv, or its bytes where Triton has no such type, as on sm_80
    """
    COLUMNS: tl.constexpr = pointers.shape[1]
    keep = keep_row[:, None]
    if WIDTH < COLUMNS:
        keep = keep & (tl.arange(0, COLUMNS)[None, :] < WIDTH)
    tile = tl.load(pointers, mask=keep, other=0.0)
    if DTYPE is not None:
        ELEMENT: tl.constexpr = pointers.dtype.element_ty
        if ELEMENT == tl.int8:
            if DTYPE == tl.bfloat16:
                tile = tl.inline_asm_elementwise(OF_BYTES_BF16, "=r,=r,r", [tile], tl.bfloat16, is_pure=False, pack=4)
            else:
                tile = tl.inline_asm_elementwise(OF_BYTES_FP16, "=r,=r,r", [tile], tl.float16, is_pure=False, pack=4)
                tile = tile.to(DTYPE)
        elif ELEMENT == tl.float8e4nv:
            tile = tile.to(DTYPE)
    return tile


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
