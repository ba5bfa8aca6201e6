"""The records that kernels take, and those of tensors.

Records are NamedTuples, which Triton takes apart; of a subclass of one it knows no fields. An optional tensor is a flag
too: None where a call has no such tensor. Three rules suit all compilers since triton 3.4. A record's None field is a
None argument of the kernel, or stands in the call that makes the record. It is no local variable, no function returns
it, and a record with such fields is never compared with None. Lengths, counts and constexprs stay outside of the
records that kernels take, where Triton ignores `do_not_specialize`.
"""

from __future__ import annotations

from collections import namedtuple
from collections.abc import Callable
from typing import Any, NamedTuple

from torch import Tensor

from ...core.terms import AXES, TERMS
from ...core.visibility import Visibility

Arguments = dict[str, Any]  # of a kernel, by name


class Strided(NamedTuple):
    """A tensor [B, H, S, D]: a pointer to its first element, and its strides."""

    ptr: Any
    b: Any
    h: Any
    s: Any
    d: Any


class Scale(NamedTuple):
    """fp32 [B, H, S] of rows or keys, or a bias [B, Hkv, group, S]: a pointer to its first element, and its strides.

    The strides of B, H and group (0 where there is no such axis) are stored times 16: Triton compiles other code for
    an integer of 1, for multiples of 16 and for the rest. Times 16 all have one code.
    """

    ptr: Any
    b: Any
    h: Any
    g: Any
    s: Any


# The tensors and flags among the terms of a logit, or None: vectors as `Scale`, biases of pairs as `Strided`, with
# stride 0 where one entry stands for all, flags as 1, of which Triton makes a constant.
LogitTerms = namedtuple(
    "LogitTerms", [one.name for one in TERMS if one.form == "flag" or (one.axes and one.enters != "sink")]
)
# Gradients of the tensors of a call, contiguous or, of biases of pairs, `Strided`; None for those not asked for.
TensorGradients = namedtuple("TensorGradients", AXES, defaults=[None] * len(AXES))

# Tangents of the tensors of a call: `Strided` of q, k, v and biases of pairs, else `Scale`; None is zero.
Tangents = namedtuple("Tangents", AXES, defaults=[None] * len(AXES))


class Masks(NamedTuple):
    """The tensors that narrow the visible keys; all may be None.

    key_lengths, key_ranges   of `pairs.key_range`
    q_starts, k_starts        of `block.sequence_bounds`
    row_bounds                int32 [B, blocks of keys, 2] of `ranges.row_bounds_kernel`, where key_ranges narrow the
                              rows of a block of keys
    mask                      `Strided` uint8 [B, Hq, Sq, Sk], strides 0 on broadcast axes
    seen                      uint8, or int16 in invariant calls, [B, Hkv, Sk] contiguous: keys that are visible to some
                              row; others are never multiplied
    """

    key_lengths: Any
    key_ranges: Any
    q_starts: Any
    k_starts: Any
    row_bounds: Any
    mask: Any
    seen: Any


class Pages(NamedTuple):
    """The positions of keys in pages: key j of sequence n is in page table[n, j // size], at j % size.

    table            int32 [sequences, length], contiguous; keys of pages outside [0, count) are zeros
    size, count      keys of a page, at least 2, and pages
    length           pages of a sequence
    inverse, shift   j // size is the upper half of j * inverse, shifted right

    All numbers are stored times 16, as the strides of `Scale`.
    """

    table: Any
    size: Any
    count: Any
    length: Any
    inverse: Any
    shift: Any


class Results(NamedTuple):
    """out [B, Hq, Sq, Dv] in q's dtype, rounding like it in int8, and lse, max_logit and entropy fp32 [B, Hq, Sq].

    All are contiguous. All but out and lse may be None. Splits of decode are an axis behind Sq.
    """

    out: Any
    rounding: Any
    lse: Any
    max_logit: Any
    entropy: Any


class SecondTerms(NamedTuple):
    """Terms of rows of the gradient of a tangent, fp32 [B, Hq, Sq], contiguous: see `attention_tangent`.

    d_sinks, d_t_sinks   gradients towards sinks and their tangents, or None
    """

    exponent: Any
    mean: Any
    delta: Any
    eta: Any
    d_sinks: Any
    d_t_sinks: Any


class View(NamedTuple):
    """Lengths of a sequence, made inside kernels, and its visibility; all but the lengths may be None: `key_range`."""

    q_len: Any
    k_len: Any
    left: Any
    right: Any
    key_lengths: Any
    key_ranges: Any


class KeyBuffers(NamedTuple):
    """The buffers of a `KeyStatistics`, or, as `Scale` and without counts, of a `PagedKeyStatistics`."""

    counts: Any
    counts_after: Any
    norms: Any
    norm_sums: Any
    norm_square_sums: Any
    norm_maxima: Any


def stretched(tensor: Tensor) -> Strided:
    """The record of a tensor whose axes of length 1 stand for any length."""
    steps = [0 if size == 1 else step for size, step in zip(tensor.shape, tensor.stride(), strict=True)]
    return Strided(tensor, *steps)


def scale_of(tensor: Tensor) -> Scale:
    """The record of a factor [B, H, S], or of a bias [B, Hkv, group, Sk]."""
    b, h, *g, s = tensor.stride()
    return Scale(tensor, 16 * b, 16 * h, 16 * g[0] if g else 0, s)


# By `Term.form`, the record of a term's value.
RECORDS: dict[str, Callable[[Any], Any]] = {"vector": scale_of, "pairs": stretched, "flag": int}


def pages_of(block_table: Tensor, count: int, size: int) -> Pages:
    """The record of a block table, int32 [sequences, max_pages], of `count` pages of `size` keys."""
    bits = (size - 1).bit_length()
    magic = 16 * (2 ** (31 + bits) // size + 1)
    return Pages(block_table.contiguous(), 16 * size, 16 * count, 16 * block_table.shape[1], magic, 16 * (bits - 1))


def view_of(visible: Visibility) -> View:
    """The arguments of kernels that use `pairs.key_range`."""
    lengths, ranges, reach = visible.key_lengths, visible.key_ranges, visible.q_len + visible.k_len
    return View(
        visible.q_len,
        visible.k_len,
        None if visible.left is None else min(visible.left, reach),
        None if visible.right is None else min(visible.right, reach),
        None if lengths is None else bounded(lengths, visible.k_len).contiguous(),
        None if ranges is None else bounded(ranges, visible.k_len).contiguous(),
    )


def bounded(x: Tensor, highest: int) -> Tensor:
    """Integers clamped to [0, highest], int32; a dtype of fewer bits is widened first, as it may not hold `highest`."""
    return (x.int() if x.dtype.itemsize < 4 else x).clamp(0, highest).int()
