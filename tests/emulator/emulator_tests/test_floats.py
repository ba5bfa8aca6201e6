"""Floating-point instructions against exact fractions, rounded once."""

from __future__ import annotations

import math
import random
from fractions import Fraction
from typing import NamedTuple

import numpy as np
import pytest

from .ptx import apply, signed


class Format(NamedTuple):
    """An IEEE-like format: bits of the fraction, the exponent of the smallest normal number, of the largest."""

    name: str
    register: str
    fraction: int
    lowest: int
    highest: int

    def decode(self, bits: int) -> Fraction | float:
        width = 16 if self.register == "b16" else 32
        sign, exponent = bits >> (width - 1), bits >> self.fraction & (1 << (width - 1 - self.fraction)) - 1
        fraction = bits & (1 << self.fraction) - 1
        if exponent == (1 << (width - 1 - self.fraction)) - 1:
            return math.nan if fraction else math.inf * (-1) ** sign
        significand = fraction + (1 << self.fraction) * (exponent > 0)
        value = Fraction(significand) * Fraction(2) ** (max(exponent, 1) - 1 + self.lowest - self.fraction)
        return -value if sign else value

    def round(self, value: Fraction) -> Fraction | float:
        """To nearest even; overflow to infinity."""
        if value == 0:
            return Fraction(0)
        exponent = max(self.lowest, math.floor(math.log2(abs(value)) if abs(value) < 1e300 else 1000))
        while abs(value) < Fraction(2) ** exponent and exponent > self.lowest:
            exponent -= 1
        while abs(value) >= Fraction(2) ** (exponent + 1):
            exponent += 1
        unit = Fraction(2) ** (exponent - self.fraction)
        rounded = round(value / unit) * unit  # Python rounds to even
        return rounded if abs(rounded) < Fraction(2) ** (self.highest + 1) else math.copysign(math.inf, value)


SINGLE = Format("f32", "b32", 23, -126, 127)
HALF = Format("f16", "b16", 10, -14, 15)
BFLOAT = Format("bf16", "b16", 7, -126, 127)
FORMATS = (SINGLE, HALF, BFLOAT)
RANDOM = random.Random(0)


def values(one: Format, count: int = 96) -> list[int]:
    """Raw numbers: small integers and fractions that tie, subnormals, anything finite."""
    width = 16 if one.register == "b16" else 32
    bias = (1 << (width - 2 - one.fraction)) - 1
    found = [0, 1 << (width - 1), 1, 3, (1 << one.fraction) - 1]
    while len(found) < count:
        exponent = bias + RANDOM.randint(-one.fraction - 2, one.fraction + 2)
        exponent = min(max(exponent, 1), 2 * bias)
        bits = RANDOM.getrandbits(one.fraction) & ~RANDOM.getrandbits(one.fraction)
        found.append(RANDOM.getrandbits(1) << (width - 1) | exponent << one.fraction | bits)
    return found


def assert_equal(one: Format, found: list[int], exact: list) -> None:
    for bits, value in zip(found, exact, strict=True):
        wanted = one.round(value) if isinstance(value, Fraction) else value
        assert one.decode(bits) == wanted or (wanted != wanted and one.decode(bits) != one.decode(bits)), value


@pytest.mark.parametrize("one", FORMATS, ids=lambda one: one.name)
@pytest.mark.parametrize("opcode", ["add", "sub", "mul", "fma"])
def test_rounded_once(opcode, one):
    a, b, c = (values(one) for _ in range(3))
    exact = {
        "add": lambda x, y, z: x + y,
        "sub": lambda x, y, z: x - y,
        "mul": lambda x, y, z: x * y,
        "fma": lambda x, y, z: x * y + z,
    }[opcode]
    operands = [(one.register, part) for part in (a, b, c)[: 3 if opcode == "fma" else 2]]
    names = ", ".join(("{a}", "{b}", "{c}")[: len(operands)])
    found = apply(f"{opcode}.rn.{one.name} {{d}}, {names};", one.register, *operands)
    assert_equal(one, found, [exact(*map(one.decode, triple)) for triple in zip(a, b, c, strict=True)])


def test_fma_near_ties():
    """Products whose sum with c lies within 2^-60 of the middle of two float32."""
    one_plus = [np.float32(1 + 2.0**-23 * i).view(np.uint32).item() for i in range(1, 33)]
    c = [np.float32(2.0 ** (-24 - i) * (-1) ** i).view(np.uint32).item() for i in range(32)]
    found = apply("fma.rn.f32 {d}, {a}, {b}, {c};", "b32", ("b32", one_plus), ("b32", one_plus[::-1]), ("b32", c))
    triples = zip(one_plus, one_plus[::-1], c, strict=True)
    assert_equal(SINGLE, found, [SINGLE.decode(x) * SINGLE.decode(y) + SINGLE.decode(z) for x, y, z in triples])


@pytest.mark.parametrize("one", [HALF, BFLOAT], ids=lambda one: one.name)
def test_packed_pairs(one):
    a, b = values(one), values(one)
    pairs = [("b32", [x | y << 16 for x, y in zip(part[::2], part[1::2], strict=True)]) for part in (a, b)]
    found = apply(f"fma.rn.{one.name}x2 {{d}}, {{a}}, {{b}}, {{a}};", "b32", *pairs)
    parts = [bits for pair in found for bits in (pair & 0xFFFF, pair >> 16)]
    exact = [one.decode(x) * one.decode(y) + one.decode(x) for x, y in zip(a, b, strict=True)]
    assert_equal(one, parts, exact)


@pytest.mark.parametrize("one", [HALF, BFLOAT], ids=lambda one: one.name)
def test_narrowing(one):
    singles = values(SINGLE, 128)
    found = apply(f"cvt.rn.{one.name}.f32 {{d}}, {{a}};", "b16", ("b32", singles))
    exact = [SINGLE.decode(bits) for bits in singles]
    assert_equal(one, found, exact)
    toward_zero = apply(f"cvt.rz.{one.name}.f32 {{d}}, {{a}};", "b16", ("b32", singles))
    for bits, nearest, value in zip(toward_zero, found, exact, strict=True):
        truncated = one.decode(bits)
        assert abs(truncated) <= abs(value)
        assert truncated == one.decode(nearest) or abs(one.decode(nearest)) > abs(value)
    high_low = apply(f"cvt.rn.{one.name}x2.f32 {{d}}, {{a}}, {{b}};", "b32", ("b32", singles), ("b32", singles[::-1]))
    assert high_low == [low | high << 16 for high, low in zip(found, found[::-1], strict=True)]


@pytest.mark.parametrize("one", [HALF, BFLOAT], ids=lambda one: one.name)
def test_widening_is_exact(one):
    found = apply(f"cvt.f32.{one.name} {{d}}, {{a}};", "b32", (one.register, values(one)))
    assert [SINGLE.decode(bits) for bits in found] == [one.decode(bits) for bits in values_again(found, one)]


def values_again(found: list[int], one: Format) -> list[int]:
    """The raw narrow numbers that these float32 came from: their upper bits, or by numpy."""
    singles = np.array(found, np.uint32)
    if one is BFLOAT:
        return (singles >> 16).tolist()
    return singles.view(np.float32).astype(np.float16).view(np.uint16).tolist()


INTEGERS = [0.0, -0.0, 0.5, 1.5, 2.5, -0.5, -1.5, 3.7, -3.7, 1e20, -1e20, 2147483520.0, math.nan, math.inf, -math.inf]


@pytest.mark.parametrize("rounding", ["rni", "rzi", "rmi", "rpi"])
@pytest.mark.parametrize(("type_name", "low", "high"), [("s32", -(2**31), 2**31 - 1), ("u32", 0, 2**32 - 1)])
def test_to_integer(type_name, low, high, rounding):
    def expected(x: float) -> int:
        if math.isnan(x):
            return 0
        if math.isinf(x):
            return high if x > 0 else low
        whole = {"rni": round, "rzi": math.trunc, "rmi": math.floor, "rpi": math.ceil}[rounding](x)
        return min(max(whole, low), high)

    raw = np.array(INTEGERS, np.float32).view(np.uint32).tolist()
    found = apply(f"cvt.{rounding}.{type_name}.f32 {{d}}, {{a}};", "b32", ("b32", raw))
    assert [signed(x, 32) if type_name == "s32" else x for x in found] == [expected(x) for x in INTEGERS]


def test_from_integer():
    integers = [RANDOM.getrandbits(32) for _ in range(40)] + [0, 1, 2**24 + 1, 2**24 + 3, 2**32 - 1]
    for type_name in ("u32", "s32"):
        found = apply(f"cvt.rn.f32.{type_name} {{d}}, {{a}};", "b32", ("b32", integers))
        exact = [Fraction(signed(x, 32) if type_name == "s32" else x) for x in integers]
        assert_equal(SINGLE, found, exact)


FUNCTIONS = {
    "ex2.approx.f32": lambda x: 2.0**x,
    "ex2.approx.ftz.f32": lambda x: 2.0**x,
    "lg2.approx.f32": math.log2,
    "rcp.approx.f32": lambda x: 1 / x,
    "rsqrt.approx.f32": lambda x: x**-0.5,
    "sqrt.rn.f32": math.sqrt,
    "sin.approx.f32": math.sin,
    "cos.approx.f32": math.cos,
    "tanh.approx.f32": math.tanh,
}


@pytest.mark.parametrize("opcode", FUNCTIONS)
def test_functions(opcode):
    x = np.array([RANDOM.uniform(0.01, 20) for _ in range(64)], np.float32)
    found = np.array(apply(f"{opcode} {{d}}, {{a}};", "b32", ("b32", x.view(np.uint32).tolist())), np.uint32)
    expected = np.array([FUNCTIONS[opcode](float(value)) for value in x])
    np.testing.assert_allclose(found.view(np.float32), expected, rtol=3e-7, atol=1e-7)


def _singles(*numbers: float) -> tuple[str, list[int]]:
    return "b32", np.array(numbers, np.float32).view(np.uint32).tolist()


def _floats(bits: list[int]) -> list[float]:
    return np.array(bits, np.uint32).view(np.float32).tolist()


def test_nan_in_minimum_and_maximum():
    a, b = _singles(1, math.nan, math.nan, 2), _singles(math.nan, 3, math.nan, -1)
    assert _floats(apply("max.f32 {d}, {a}, {b};", "b32", a, b))[:2] == [1, 3]
    assert _floats(apply("min.f32 {d}, {a}, {b};", "b32", a, b))[3] == -1
    kept = _floats(apply("max.NaN.f32 {d}, {a}, {b};", "b32", a, b))
    assert all(math.isnan(x) for x in kept[:3])
    assert kept[3] == 2


@pytest.mark.parametrize("modifier", ["", "NaN."])
def test_minus_zero_lies_below_zero(modifier):
    a, b = _singles(0.0, -0.0, 0.0, -0.0), _singles(-0.0, 0.0, 0.0, -0.0)
    for name, signs in (("max", [1, 1, 1, -1]), ("min", [-1, -1, 1, -1])):
        found = _floats(apply(f"{name}.{modifier}f32 {{d}}, {{a}}, {{b}};", "b32", a, b))
        assert [math.copysign(1, x) for x in found] == signs


@pytest.mark.parametrize(
    ("comparison", "holds"),
    [("lt", False), ("ne", False), ("ltu", True), ("neu", True), ("equ", True), ("num", False), ("nan", True)],
)
def test_comparisons_with_nan(comparison, holds):
    nan, one = _singles(math.nan), _singles(1.0)
    assert apply(f"setp.{comparison}.f32 {{d}}, {{a}}, {{b}};", "pred", nan, one) == [int(holds)]


def test_subnormals_are_flushed_where_asked():
    tiny = _singles(2.0**-130, -(2.0**-130))
    assert _floats(apply("mul.f32 {d}, {a}, 0f40000000;", "b32", tiny)) == [2.0**-129, -(2.0**-129)]
    assert _floats(apply("mul.ftz.f32 {d}, {a}, 0f40000000;", "b32", tiny)) == [0, 0]
    assert _floats(apply("ex2.approx.ftz.f32 {d}, {a};", "b32", _singles(-130.0))) == [0]


def test_saturation():
    found = apply("add.sat.f32 {d}, {a}, 0f00000000;", "b32", _singles(-2, 0.25, 7, math.nan))
    assert _floats(found) == [0, 0.25, 1, 0]


def test_pairs_of_e4m3():
    """1 and 448; -1 and the smallest; 0 and NaN."""
    *numbers, last = apply("cvt.rn.f16x2.e4m3x2 {d}, {a};", "b32", ("b16", [0x7E38, 0x01B8, 0xFF00]))
    assert numbers == [0x5F003C00, 0x1800BC00]
    assert (last & 0xFFFF, math.isnan(HALF.decode(last >> 16))) == (0, True)


def test_tf32_rounds_away_from_ties():
    found = apply("cvt.rna.tf32.f32 {d}, {a};", "b32", ("b32", [0x3F801000, 0x3F800FFF, 0x3F802000]))
    assert found == [0x3F802000, 0x3F800000, 0x3F802000]


def test_unsupported_rounding_is_refused():
    from ptx_emulator import PTXError

    with pytest.raises(PTXError, match="unsupported instruction"):
        apply("add.rz.f32 {d}, {a}, {a};", "b32", _singles(1))
