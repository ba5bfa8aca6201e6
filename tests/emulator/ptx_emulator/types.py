"""PTX types as numpy has them, and conversions between the raw bits of a register and the numbers they stand for.

A register is an unsigned array with one element per thread (bool for a predicate). f16 and bf16 are computed on in
float32 and rounded once, to nearest even; packed pairs have one more axis of length 2.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy import float16 as f2
from numpy import float32 as f4
from numpy import float64 as f8
from numpy import int64 as i8
from numpy import uint8 as u1
from numpy import uint16 as u2
from numpy import uint32 as u4
from numpy import uint64 as u8

RAW = {1: u1, 2: u2, 4: u4, 8: u8}
NAN_HALF = u2(0x7FFF)  # of f16 and of bf16


class PTXType(NamedTuple):
    """numpy's name of the type, bytes, and the encoding of its numbers."""

    dtype: str
    size: int
    encoding: str


TYPES = {"pred": PTXType("?", 0, "predicate")}
for _bits in (8, 16, 32, 64):
    TYPES[f"b{_bits}"] = TYPES[f"u{_bits}"] = PTXType(f"u{_bits // 8}", _bits // 8, "unsigned")
    TYPES[f"s{_bits}"] = PTXType(f"i{_bits // 8}", _bits // 8, "signed")
TYPES.update(
    f16=PTXType("f2", 2, "half"),
    bf16=PTXType("u2", 2, "bfloat"),
    f32=PTXType("f4", 4, "float"),
    f64=PTXType("f8", 8, "float"),
    tf32=PTXType("u4", 4, "unsigned"),
    f16x2=PTXType("u4", 4, "half pair"),
    bf16x2=PTXType("u4", 4, "bfloat pair"),
    f32x2=PTXType("u8", 8, "float pair"),
    u16x2=PTXType("u2", 4, "integer pair"),
    s16x2=PTXType("i2", 4, "integer pair"),
)

# Encoding -> expression that reads a register as numbers, and one that makes raw bits of numbers.
CODECS = {
    "predicate": ("{value}", "{value}"),
    "unsigned": ("{value}", "{value}"),
    "signed": ("{value}.view({dtype})", "({value}).view(u{size})"),
    "float": ("{value}.view({dtype})", "({value}).view(u{size})"),
    "half": ("{value}.view(f2).astype(f4)", "to_half({value})"),
    "bfloat": ("from_bfloat({value})", "to_bfloat({value})"),
    "half pair": ("from_half_pair({value})", "to_half_pair({value})"),
    "bfloat pair": ("from_bfloat_pair({value})", "to_bfloat_pair({value})"),
    "float pair": ("from_float_pair({value})", "to_float_pair({value})"),
    "integer pair": ("from_integer_pair({value},{dtype})", "to_integer_pair({value})"),
}
FLOAT_ENCODINGS = ("float", "half", "bfloat", "half pair", "bfloat pair", "float pair")
SIXTEEN_BIT_ENCODINGS = ("half", "bfloat", "half pair", "bfloat pair")


def from_bfloat(bits):
    return (bits.astype(u4) << u4(16)).view(f4)


def from_half_pair(bits):
    return np.ascontiguousarray(bits).view(f2).reshape((*bits.shape, 2)).astype(f4)


def from_bfloat_pair(bits):
    return np.stack([bits << u4(16), bits & u4(0xFFFF0000)], -1).view(f4)


def from_float_pair(bits):
    return np.ascontiguousarray(bits).view(f4).reshape(-1, 2)


def from_integer_pair(bits, dtype):
    return np.ascontiguousarray(bits).view(dtype).reshape((*bits.shape, 2))


def to_half(x):
    """Raw f16, to nearest even; one pattern for every NaN."""
    rounded = np.asarray(x).astype(f2)
    nan = np.isnan(rounded)
    bits = rounded.view(u2)
    return np.where(nan, NAN_HALF, bits) if nan.any() else bits


def to_half_toward_zero(x):
    bits = to_half(x)
    too_large = np.abs(bits.view(f2).astype(f4)) > np.abs(x)
    return np.where(too_large & ~np.isnan(x), bits - u2(1), bits)


def to_bfloat(x):
    """Raw bf16 of float32 or float64, to nearest even; one pattern for every NaN."""
    x = np.asarray(x)
    if x.dtype == f8:
        x = round_to_odd(x)
    bits = x.view(u4)
    rounded = ((bits + u4(0x7FFF) + ((bits >> u4(16)) & u4(1))) >> u4(16)).astype(u2)
    nan = np.isnan(x)
    return np.where(nan, NAN_HALF, rounded) if nan.any() else rounded


def to_bfloat_toward_zero(x):
    return np.where(np.isnan(x), NAN_HALF, (x.view(u4) >> u4(16)).astype(u2))


def pack(low, high):
    """Two raw 16-bit values in one register."""
    return low.astype(u4) | (high.astype(u4) << u4(16))


def to_half_pair(x):
    return pack(to_half(x[..., 0]), to_half(x[..., 1]))


def to_bfloat_pair(x):
    return pack(to_bfloat(x[..., 0]), to_bfloat(x[..., 1]))


def to_integer_pair(x):
    return np.ascontiguousarray(x).view(u4).reshape(-1)


def to_float_pair(x):
    return np.ascontiguousarray(x).view(u8).reshape(-1)


def round_to_odd(x):
    """float64 -> float32 whose last bit is set where inexact, so that rounding it once more is right."""
    rounded = x.astype(f4)
    bits = rounded.view(u4)
    back = rounded.astype(f8)
    bits = np.where(np.abs(back) > np.abs(x), bits - u4(1), bits)
    return np.where((back != x) & np.isfinite(x), bits | u4(1), bits).view(f4)


def to_integer(x, dtype, rounding: str):
    """Integer of a float, saturated; NaN gives 0. rounding: rni, rzi, rmi or rpi."""
    rounded = ROUND_TO_INTEGER[rounding](x).astype(f8)
    limits = np.iinfo(dtype)
    low, high = float(limits.min), float(limits.max)
    outside = np.isnan(rounded) | (rounded >= high) | (rounded <= low)
    wide = i8 if limits.min < 0 or limits.bits < 64 else u8
    inside = np.where(outside, 0.0, rounded).astype(wide).astype(dtype)
    low_side = np.where(rounded <= low, dtype(limits.min), inside)
    return np.where(rounded >= high, dtype(limits.max), low_side).astype(dtype)


ROUND_TO_INTEGER = {"rni": np.rint, "rzi": np.trunc, "rmi": np.floor, "rpi": np.ceil}


def decode_operand(bits, element: str):
    """Matrix operands: raw 32-bit registers [..., n] -> float32 [..., n, elements per register]."""
    if element == "bf16":
        return from_bfloat_pair(bits)
    if element == "f16":
        return bits.view(f2).reshape((*bits.shape, 2)).astype(f4)
    if element == "tf32":
        return (bits & u4(0xFFFFE000)).view(f4)[..., None]  # the hardware ignores the low 13 bits
    return bits.view("i1" if element == "s8" else "u1").reshape((*bits.shape, 4)).astype(f4)
