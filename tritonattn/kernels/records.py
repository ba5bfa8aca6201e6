"""Records that kernels take, and pass to the functions inside them: NamedTuples, which Triton takes apart.

An optional tensor is its own flag: its record, or its member of a record, is None where a call has no such tensor.

Three rules suit all compilers since triton 3.4. A record's None member is a None argument of the kernel, or stands
in the call that makes the record (`None if x is None else begin(x)`). It is no local variable, no function returns it,
and a record with such members is never compared with None. Lengths and counts stay outside of the records that kernels
take, where Triton ignores `do_not_specialize`. So do constexprs.
"""

from __future__ import annotations

from typing import Any, NamedTuple

# ---- Arguments of kernels


class Strided(NamedTuple):
    """A tensor [B, H, S, D]: a pointer to its first element, and its strides."""

    ptr: Any
    b: Any
    h: Any
    s: Any
    d: Any


class Scale(NamedTuple):
    """A factor [B, H, S] of rows or keys: a pointer to its first element, 16 times the strides of B and H, that of S.

    Triton compiles other code for an integer of 1, for multiples of 16 and for the rest. Times 16 all have one code.
    """

    ptr: Any
    b: Any
    h: Any
    s: Any


class Bias(NamedTuple):
    """A bias [B, Hkv, group, Sk] of keys: as `Scale`, g the stride of the group's query heads."""

    ptr: Any
    b: Any
    h: Any
    g: Any
    s: Any


class Ranges(NamedTuple):
    """key_lengths int32 [B] or None; key_ranges int32 [B, Sq, 2], contiguous, or None: `walk.row_range`."""

    key_lengths: Any
    key_ranges: Any


class LogitTerms(NamedTuple):
    """Terms of the logits of all rows: scale, softcap or None, sinks fp32 [Hq] or None."""

    scale: Any
    softcap: Any
    sinks: Any


class DropoutState(NamedTuple):
    """`Dropout.state`, and the factor of kept probabilities."""

    state: Any
    keep_scale: Any


class Starts(NamedTuple):
    """q, k   int32 [N + 1]: the first row and the first key of each packed sequence, and the ends of the last one.

    Sequences follow one another in batch entry 0. The first begins at 0, the last ends at the packed axes' lengths.
    """

    q: Any
    k: Any


class Pages(NamedTuple):
    """Where keys in pages lie: key j of member n is in page table[n, j // size], at j % size.

    table          int32 [members, length], contiguous; keys of pages outside [0, count) are zeros
    size, count    keys of a page, at least 2, and pages
    length         pages of a member
    bits           of size - 1

    All numbers are stored times 16, as the strides of `Scale`.
    """

    table: Any
    size: Any
    count: Any
    length: Any
    bits: Any


class Results(NamedTuple):
    """out [B, Hq, Sq, Dv] in q's dtype, rounding like it in int8, and lse, max_logit and entropy fp32 [B, Hq, Sq].

    All are contiguous. All but out and lse may be None. Splits of decode are an axis behind Sq.
    """

    out: Any
    rounding: Any
    lse: Any
    max_logit: Any
    entropy: Any


class RowTerms(NamedTuple):
    """Terms of each row for the backward passes: `row_terms.attention_row_terms`."""

    both: Any
    delta: Any


class KeyBuffers(NamedTuple):
    """The buffers of a `KeyStatistics`, or, as `Scale` and without counts, of a `PagedKeyStatistics`."""

    counts: Any
    counts_after: Any
    norms: Any
    norm_sums: Any
    norm_square_sums: Any
    norm_maxima: Any


# ---- Made inside kernels


class Place(NamedTuple):
    """The batch entry, query head, key head and member of a program.

    batch                  entry of the tensors: 0 where sequences are packed
    q_heads, group         query heads of the call, and of each key head
    member                 number of the batch entry or packed sequence
    first_row, first_key   where the member's rows and keys begin in the tensors
    """

    batch: Any
    head: Any
    kv_head: Any
    q_heads: Any
    group: Any
    member: Any
    first_row: Any
    first_key: Any


class MemberPages(NamedTuple):
    """`Pages` of one member, its numbers as they are; j // size is the upper half of j * inverse, shifted right."""

    table: Any
    size: Any
    count: Any
    length: Any
    inverse: Any
    shift: Any


class View(NamedTuple):
    """Lengths of a member and its visibility; all but the lengths may be None: `walk.row_range`."""

    q_len: Any
    k_len: Any
    left: Any
    right: Any
    key_lengths: Any
    key_ranges: Any


class Rows(NamedTuple):
    """A block of rows first .. last. offs: their indices, clamped to the last row; row i sees the keys lo <= j < hi.

    keep   which indices are rows at all
    """

    first: Any
    last: Any
    offs: Any
    keep: Any
    lo: Any
    hi: Any


class Sight(NamedTuple):
    """A block of rows, its place and its visibility.

    mask   `Strided` uint8 or None: of all heads, inside a walk [Sq, Sk] of this one
    """

    place: Place
    rows: Rows
    view: View
    mask: Strided


class Walk(NamedTuple):
    """The keys that a block of rows looks at, or the rows that a block of keys looks at.

    Outside [touch_lo, touch_hi) nothing of the block is seen. In [full_start, full_end) all of it is, and no mask is
    needed; both bounds are multiples of the step, full_start <= full_end.
    """

    touch_lo: Any
    touch_hi: Any
    full_start: Any
    full_end: Any


class Keys(NamedTuple):
    """Keys and values: whole tensors, or, inside a walk, from the first key of one (member, key head) on.

    descriptors   tensor descriptors of the whole of k and v with blocks [1, 1, keys, D or Dv], or None
    scale, bias   fp32 or None: `Scale` and `Bias`, inside a walk two `Scale`
    seen          uint8 or None: keys that some row sees
    pages         None, or `Pages`, inside a walk `MemberPages`; k and v then begin with the head's slot 0 of page 0
    """

    k: Strided
    v: Strided
    k_descriptor: Any
    v_descriptor: Any
    scale: Scale
    bias: Scale
    seen: Any
    pages: Pages


class KeyBlock(NamedTuple):
    """A block of keys [N, D] and values [N, Dv], their indices [N], and logits [M, N] without the rows' factor."""

    offs: Any
    k: Any
    v: Any
    logits: Any


class Dropout(NamedTuple):
    """state int64 [2] or None: seed and offset; a pair is kept where its word of Philox is at least keep_from.

    rows         indices of a block's rows in the packed axis; first_key: where the member's keys begin in theirs
    batch_head   batch entry * Hq + head
    """

    state: Any
    keep_from: Any
    keep_scale: Any
    batch_head: Any
    rows: Any
    first_key: Any
