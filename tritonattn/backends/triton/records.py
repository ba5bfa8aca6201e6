"""The records that kernels take, and the arguments that tensors, masks and terms of logits become.

Records are NamedTuples, which Triton takes apart. An optional tensor is its own flag: None where a call has no such
tensor. Three rules suit all compilers since triton 3.4. A record's None member is a None argument of the kernel, or
stands in the call that makes the record. It is no local variable, no function returns it, and a record with such
members is never compared with None. Lengths, counts and constexprs stay outside of the records that kernels take,
where Triton ignores `do_not_specialize`.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from torch import Tensor

from ...core.call import Logits
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


class Pages(NamedTuple):
    """Where keys in pages lie: key j of sequence n is in page table[n, j // size], at j % size.

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


def strided(tensor: Tensor) -> Strided:
    return Strided(tensor, *tensor.stride())


def stretched(tensor: Tensor) -> Strided:
    """The record of a tensor whose axes of length 1 stand for any length."""
    steps = [0 if size == 1 else step for size, step in zip(tensor.shape, tensor.stride(), strict=True)]
    return Strided(tensor, *steps)


def scale_of(tensor: Tensor) -> Scale:
    """The record of a factor [B, H, S], or of a bias [B, Hkv, group, Sk]."""
    b, h, *g, s = tensor.stride()
    return Scale(tensor, 16 * b, 16 * h, 16 * g[0] if g else 0, s)


def logit_arguments(logits: Logits) -> Arguments:
    """The arguments that say what a logit is, and the softmax's other terms."""
    return {
        "scale": float(logits.scale),
        "query_scale": None if logits.query_scale is None else scale_of(logits.query_scale),
        "key_scale": None if logits.key_scale is None else scale_of(logits.key_scale),
        "key_bias": None if logits.key_bias is None else scale_of(logits.key_bias),
        "bias": None if logits.bias is None else stretched(logits.bias),
        "relative_bias": None if logits.relative_bias is None else stretched(logits.relative_bias),
        "extent": None if logits.relative_bias is None else logits.relative_bias.shape[3],
        "relative_right": None if logits.relative_bias is None else logits.relative_right,
        "softcap": None if logits.softcap is None else float(logits.softcap),
        "sinks_ptr": None if logits.sinks is None else logits.sinks.contiguous(),
    }


def pages_of(block_table: Tensor, count: int, size: int) -> Pages:
    """The record of a block table, int32 [sequences, max_pages], of `count` pages of `size` keys."""
    bits = (size - 1).bit_length()
    magic = 16 * (2 ** (31 + bits) // size + 1)
    return Pages(block_table.contiguous(), 16 * size, 16 * count, 16 * block_table.shape[1], magic, 16 * (bits - 1))


def range_arguments(visible: Visibility) -> Arguments:
    """The arguments of kernels that use `block.key_range`."""
    lengths, ranges = visible.key_lengths, visible.key_ranges
    reach = visible.q_len + visible.k_len
    return {
        "left": None if visible.left is None else min(visible.left, reach),
        "right": None if visible.right is None else min(visible.right, reach),
        "key_lengths": None if lengths is None else bounded(lengths, visible.k_len).contiguous(),
        "key_ranges": None if ranges is None else bounded(ranges, visible.k_len).contiguous(),
        "q_len": visible.q_len,
        "k_len": visible.k_len,
    }


def bounded(x: Tensor, highest: int) -> Tensor:
    """Integers clamped to [0, highest], int32; a dtype of fewer bits is widened first, as it may not hold `highest`."""
    return (x.int() if x.dtype.itemsize < 4 else x).clamp(0, highest).int()
