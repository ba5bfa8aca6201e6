"""Arithmetic that numpy lacks or rounds otherwise, on arrays with one element per thread."""

from __future__ import annotations

import numpy as np
from numpy import float32 as f4
from numpy import float64 as f8
from numpy import int32 as i4
from numpy import int64 as i8
from numpy import uint32 as u4
from numpy import uint64 as u8

TINY = f4(2.0**-126)


def flush_subnormals(x):
    """float32 subnormals become zeros of their sign; other types pass."""
    if x.dtype != f4:
        return x
    size = np.abs(x)
    tiny = (size < TINY) & (size > 0)
    return np.where(tiny, np.copysign(f4(0), x), x) if tiny.any() else x


def add_to_odd(a, b):
    """float64 sum whose last bit is set where inexact, so that rounding it once more, to a shorter format, is exact."""
    total = a + b
    b_part = total - a
    error = (a - (total - b_part)) + (b - b_part)  # Knuth's TwoSum
    bits = total.view(i8)
    even = (error != 0) & ((bits & 1) == 0) & np.isfinite(total)
    return np.where(even, np.where((error > 0) == (total > 0), bits + 1, bits - 1), bits).view(f8)


def fma(a, b, c):
    """a * b + c of float32 with one rounding (of float64: with two).

    The product is exact in float64; where the float64 sum lies near the middle of two float32, it is rounded to odd.
    """
    if getattr(a, "dtype", None) == f8:
        return a * b + c
    product = np.multiply(a, b, dtype=f8)
    total = product + c
    near_tie = (total.view(i8) & i8(0x1FFFFFFF)) == 0x10000000
    if near_tie.any() or (np.abs(total) < 2.0**-125).any():
        total = add_to_odd(product, np.asarray(c, dtype=f8))
    return total.astype(f4)


def fma_to_odd(a, b, c):
    """a * b + c of 16-bit floats in float64, to be rounded once by the type's codec."""
    return add_to_odd(np.multiply(a, b, dtype=f8), np.asarray(c, dtype=f8))


def float_min(a, b, keep_nan: bool = False):
    """The smaller of two floats, -0 below +0; of a number and NaN the number, or, with keep_nan, NaN."""
    result = np.minimum(a, b) if keep_nan else np.fmin(a, b)
    zero = (a == 0) & (b == 0)
    return np.where(zero, np.where(np.signbit(a), a, b), result) if zero.any() else result


def float_max(a, b, keep_nan: bool = False):
    """The larger one, as `float_min`."""
    result = np.maximum(a, b) if keep_nan else np.fmax(a, b)
    zero = (a == 0) & (b == 0)
    return np.where(zero, np.where(np.signbit(a), b, a), result) if zero.any() else result


def exp2_flushed(x):
    result = np.exp2(x)
    return result * (result >= TINY)


def reciprocal_sqrt(x):
    return (1.0 / np.sqrt(x.astype(f8))).astype(x.dtype)


def integer_divide(a, b):
    """C's division: toward zero."""
    if a.dtype.kind == "u":
        return a // b
    raw = f"u{a.dtype.itemsize}"
    quotient = (np.abs(a).view(raw) // np.maximum(np.abs(b).view(raw), 1)).view(a.dtype)
    return np.where((a < 0) != (b < 0), -quotient, quotient)


def integer_remainder(a, b):
    return a - integer_divide(a, b) * b


def multiply_high(a, b):
    """The upper half of the double-width product."""
    bits = a.dtype.itemsize * 8
    if bits < 64:
        wide = {16: ("u4", "i4"), 32: ("u8", "i8")}[bits][a.dtype.kind == "i"]
        return (a.astype(wide) * b.astype(wide) >> np.dtype(wide).type(bits)).astype(a.dtype)
    if a.dtype.kind == "i":
        high = multiply_high(a.view(u8), b.view(u8)).view(i8)
        return high - np.where(a < 0, b, 0) - np.where(b < 0, a, 0)
    low_mask, half = u8(0xFFFFFFFF), u8(32)
    a_low, a_high, b_low, b_high = a & low_mask, a >> half, b & low_mask, b >> half
    middle = a_low * b_high + (a_low * b_low >> half)
    return a_high * b_high + (middle >> half) + ((a_high * b_low + (middle & low_mask)) >> half)


def extract_bits(a, position, length, signed: bool):
    """PTX bfe: `length` bits from `position`; beyond the top bit come zeros, or copies of the sign."""
    bits = a.dtype.itemsize * 8
    x = a.view(f"i{a.dtype.itemsize}") if signed else a
    position, length = np.minimum(position & u4(255), 255).astype(i4), np.minimum(length & u4(255), 255).astype(i4)
    if signed:  # to the top, then an arithmetic shift down
        left = np.clip(bits - (position + length), 0, bits)
        top = x << np.minimum(left, bits - 1).astype(x.dtype)
        return np.where(length == 0, 0, top >> np.minimum(left + position, bits - 1).astype(x.dtype)).astype(x.dtype)
    shifted = x >> np.minimum(position, bits).astype(x.dtype)
    mask = ((u8(1) << np.minimum(length, 63).astype(u8)) - u8(1)).astype(x.dtype)
    return np.where(length >= bits, shifted, shifted & mask).astype(x.dtype)


def insert_bits(a, b, position, length):
    """PTX bfi: b with `length` bits of a at `position`."""
    dtype = b.dtype.type
    bits = np.dtype(dtype).itemsize * 8
    position, length = (position & u4(255)).astype(u8), (length & u4(255)).astype(u8)
    field = np.where(length >= 64, ~u8(0), (u8(1) << np.minimum(length, 63)) - u8(1))
    field = np.where(position >= bits, u8(0), field << np.minimum(position, 63)).astype(dtype)
    return (b & ~field) | ((np.asarray(a).astype(u8) << np.minimum(position, 63)).astype(dtype) & field)


def permute_bytes(a, b, selector):
    """PTX prmt: each of four nibbles picks a byte of b:a, or, with its top bit, copies of that byte's sign."""
    value = (b.astype(u8) << u8(32)) | a.astype(u8)
    result = u4(0)
    for i in range(4):
        nibble = (selector >> u4(4 * i)) & u4(15)
        byte = ((value >> (u8(8) * (nibble & u4(7)).astype(u8))) & u8(255)).astype(u4)
        byte = np.where(nibble & u4(8), np.where(byte & u4(0x80), u4(255), u4(0)), byte)
        result = result | (byte << u4(8 * i))
    return result


def lop3(a, b, c, table):
    """Any bitwise function of three values, by its truth table."""
    result = u4(0)
    for i in range(8):
        if int(table) >> i & 1:
            result = result | ((a if i & 4 else ~a) & (b if i & 2 else ~b) & (c if i & 1 else ~c))
    return result


def funnel_shift(low, high, count, left: bool, wrap: bool):
    """PTX shf: 32 bits of high:low shifted left or right."""
    count = (count & u4(31) if wrap else np.minimum(count, u4(32))).astype(u8)
    value = (high.astype(u8) << u8(32)) | low.astype(u8)
    return ((value << count) >> u8(32) if left else value >> count).astype(u4)


def count_bits(a):
    return np.bitwise_count(a).astype(u4)


def highest_bit(a):
    """Position of the highest set bit, 0xffffffff when there is none."""
    a = a.astype(u8)
    position = np.zeros(a.shape, i8) - 1
    for step in (32, 16, 8, 4, 2, 1):
        large = a >= (u8(1) << u8(step))
        position = position + np.where(large, step, 0)
        a = np.where(large, a >> u8(step), a)
    return np.where(a > 0, position + 1, -1).astype(i4).view(u4)


def reverse_bits(a):
    one, bits = a.dtype.type(1), a.dtype.itemsize * 8
    result = np.zeros_like(a)
    for i in range(bits):
        result |= ((a >> a.dtype.type(i)) & one) << a.dtype.type(bits - 1 - i)
    return result


def compare_floats(comparison: str, a, b):
    """The comparisons that numpy lacks: ne, num, nan, and those that hold for NaN (equ, ltu, ...)."""
    unordered = np.isnan(a) | np.isnan(b)
    if comparison == "num":
        return ~unordered
    if comparison == "nan":
        return unordered
    if comparison == "ne":
        return (a != b) & ~unordered
    return COMPARISONS[comparison[:-1]](a, b) | unordered


COMPARISONS = {
    "eq": np.equal, "ne": np.not_equal, "lt": np.less, "le": np.less_equal, "gt": np.greater, "ge": np.greater_equal,
}  # fmt: skip


def saturate(x):
    """To [0, 1]; NaN gives 0."""
    return np.fmin(np.fmax(x, f4(0)), f4(1))


def _e4m3(byte: int) -> float:
    sign, exponent, mantissa = byte >> 7, byte >> 3 & 15, byte & 7
    size = 2.0 ** (exponent - 7) * (1 + mantissa / 8) if exponent else 2.0**-6 * mantissa / 8
    return (-1) ** sign * (np.nan if byte & 127 == 127 else size)


_HALVES_OF_E4M3 = np.array([_e4m3(byte) for byte in range(256)], "f2").view("u2").astype(u4)


def half_pair_of_e4m3(x):
    """The f16x2 of the pair of e4m3 in 16 bits, the low one in the low half."""
    return _HALVES_OF_E4M3[x & 255] | _HALVES_OF_E4M3[x >> 8] << u4(16)
