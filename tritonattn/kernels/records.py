"""Records that kernels take, and pass to the functions inside them: NamedTuples, which Triton takes apart.

An optional tensor is its own flag: its record, or its member of a record, is None where a call has no such tensor.

Three rules keep all compilers from triton 3.4 on content. A record's None member is a None argument of the kernel, not
a local variable, and a record with such members is never compared with None. Lengths and counts stay outside of
records, where Triton ignores `do_not_specialize`. So do constexprs.
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
    """A factor [B, H, S] of rows or keys: a pointer to its first element, the strides of B and H in 16ths, that of S.

    Triton compiles other code for an integer of 1, for multiples of 16 and for the rest: 16ths are multiples all.
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

    Sequences lie behind one another in batch entry 0, from 0 up to the lengths of the packed axes, never falling.
    """

    q: Any
    k: Any


class Pages(NamedTuple):
    """Where keys in pages lie: key j of member n is in page table[n, j // size], at j % size.

    table          int32 [members, length], contiguous; keys of pages outside [0, count) are zeros
    size, count    keys of a page, at least 2, and pages
    length         pages of a member
    bits           of size - 1

    The numbers are in 16ths, as those of `Scale`.
    """

    table: Any
    size: Any
    count: Any
    length: Any
    bits: Any


class Results(NamedTuple):
    """out [B, Hq, Sq, Dv] in q's dtype, rounding int8 or None; the others fp32 [B, Hq, Sq], but lse possibly None.

    All are contiguous. Splits of decode are an axis behind Sq.
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
    """The buffers of a `KeyStatistics`, or, without counts, of a `PagedKeyStatistics`: `key_statistics`."""

    counts: Any
    counts_after: Any
    lengths: Any
    length_sums: Any
    square_sums: Any
    length_maxima: Any


# ---- Made inside kernels


class Place(NamedTuple):
    """A program's batch entry in memory, its query and key head of q_heads in groups, and the start of its member.

    A member is a batch entry or a packed sequence; first_row and first_key are those of its rows and keys in memory.
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
    """Lengths of a member and the parts of its visibility, each but the lengths possibly None: `walk.row_range`."""

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
    """A block of rows, where its program is, and its visibility; mask is a `Strided` uint8 [Sq, Sk], or None."""

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
    """Keys and values: the whole tensors, or, inside a walk, from the first key of one (member, key head) on.

    descriptors   tensor descriptors of the whole of k and v with blocks [1, 1, keys, D or Dv], or None
    scale, bias   fp32 or None, also inside a walk `Scale` both
    seen          uint8 [Sk] or None: keys that some row sees
    pages         `Pages`, inside a walk `MemberPages`, or None; with pages k and v begin at the head's slot 0 of page 0
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
