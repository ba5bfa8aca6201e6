"""Integer instructions against Python's integers."""

from __future__ import annotations

import random

import pytest

from .ptx import apply, signed

RANDOM = random.Random(0)
EDGES = (0, 1, 2, 31, 32, 33, 0x7FFFFFFF, 0x80000000, 0x80000001, 0xFFFFFFFE, 0xFFFFFFFF)
WORDS = [*EDGES, *(RANDOM.getrandbits(32) for _ in range(21)), *(RANDOM.getrandbits(8) for _ in range(8))]
PAIRS = [(a, b) for a in WORDS for b in RANDOM.sample(WORDS, 4)]
LEFT, RIGHT = ("b32", [a for a, _ in PAIRS]), ("b32", [b for _, b in PAIRS])
THIRD = ("b32", [RANDOM.choice(WORDS) for _ in PAIRS])
MASK = 0xFFFFFFFF


def s32(x: int) -> int:
    return signed(x, 32)


def quotient(a: int, b: int) -> int:
    """Toward zero."""
    return abs(a) // abs(b) * (1 if (a < 0) == (b < 0) else -1)


def clamp(x: int) -> int:
    return min(x & 0xFF if x < 1 << 31 else x, 255)


def by_halves(function):
    """The two halves of a register, 16 bits each, are computed apart and signed."""
    return lambda a, b: (
        (function(signed(a, 16), signed(b, 16)) & 0xFFFF) | (function(signed(a >> 16, 16), signed(b >> 16, 16)) << 16)
    )


TWO = {
    "add.s16x2": by_halves(lambda a, b: a + b),
    "min.s16x2": by_halves(min),
    "max.s16x2": by_halves(max),
    "add.s32": lambda a, b: a + b,
    "sub.s32": lambda a, b: a - b,
    "mul.lo.s32": lambda a, b: a * b,
    "mul.hi.u32": lambda a, b: a * b >> 32,
    "mul.hi.s32": lambda a, b: s32(a) * s32(b) >> 32,
    "mul24.lo.u32": lambda a, b: (a & 0xFFFFFF) * (b & 0xFFFFFF),
    "min.u32": min,
    "max.u32": max,
    "min.s32": lambda a, b: min(s32(a), s32(b)),
    "max.s32": lambda a, b: max(s32(a), s32(b)),
    "min.relu.s32": lambda a, b: max(min(s32(a), s32(b)), 0),
    "max.relu.s32": lambda a, b: max(s32(a), s32(b), 0),
    "and.b32": lambda a, b: a & b,
    "or.b32": lambda a, b: a | b,
    "xor.b32": lambda a, b: a ^ b,
    "shl.b32": lambda a, b: a << b if b < 32 else 0,
    "shr.u32": lambda a, b: a >> b if b < 32 else 0,
    "shr.s32": lambda a, b: s32(a) >> min(b, 31),
}
WIDE = {"mul.wide.u32": lambda a, b: a * b, "mul.wide.s32": lambda a, b: s32(a) * s32(b)}
ONE = {
    "not.b32": lambda a: ~a,
    "neg.s32": lambda a: -s32(a),
    "abs.s32": lambda a: abs(s32(a)),
    "popc.b32": lambda a: bin(a).count("1"),
    "clz.b32": lambda a: 32 - a.bit_length(),
    "bfind.u32": lambda a: a.bit_length() - 1,
    "brev.b32": lambda a: int(f"{a:032b}"[::-1], 2),
    "cvt.u32.u8": lambda a: a & 0xFF,
    "cvt.s32.s8": lambda a: signed(a, 8),
    "cvt.s32.s16": lambda a: signed(a, 16),
}
COMPARISONS = {"eq": "==", "ne": "!=", "lt": "<", "le": "<=", "gt": ">", "ge": ">="}


@pytest.mark.parametrize("opcode", TWO)
def test_two_operands(opcode):
    expected = [TWO[opcode](a, b) & MASK for a, b in PAIRS]
    assert apply(f"{opcode} {{d}}, {{a}}, {{b}};", "b32", LEFT, RIGHT) == expected


@pytest.mark.parametrize("opcode", WIDE)
def test_wide_products(opcode):
    expected = [WIDE[opcode](a, b) & (1 << 64) - 1 for a, b in PAIRS]
    assert apply(f"{opcode} {{d}}, {{a}}, {{b}};", "b64", LEFT, RIGHT) == expected


@pytest.mark.parametrize("opcode", ONE)
def test_one_operand(opcode):
    assert apply(f"{opcode} {{d}}, {{a}};", "b32", LEFT) == [ONE[opcode](a) & MASK for a in LEFT[1]]


@pytest.mark.parametrize("opcode", ["div.s32", "rem.s32", "div.u32", "rem.u32"])
def test_division(opcode):
    def expected(a: int, b: int) -> int:
        a, b = (s32(a), s32(b)) if opcode.endswith("s32") else (a, b)
        result = quotient(a, b)
        return (result if opcode.startswith("div") else a - result * b) & MASK

    pairs = [(a, b) for a, b in PAIRS if b]
    operands = ("b32", [a for a, _ in pairs]), ("b32", [b for _, b in pairs])
    assert apply(f"{opcode} {{d}}, {{a}}, {{b}};", "b32", *operands) == [expected(a, b) for a, b in pairs]


def test_multiply_add():
    third = THIRD[1]
    low = apply("mad.lo.s32 {d}, {a}, {b}, {c};", "b32", LEFT, RIGHT, THIRD)
    assert low == [(a * b + c) & MASK for (a, b), c in zip(PAIRS, third, strict=True)]
    wide = apply("cvt.u64.u32 %rd60, {c}; mad.wide.u32 {d}, {a}, {b}, %rd60;", "b64", LEFT, RIGHT, THIRD)
    assert wide == [(a * b + c) & (1 << 64) - 1 for (a, b), c in zip(PAIRS, third, strict=True)]


@pytest.mark.parametrize("type_name", ["u64", "s64"])
def test_high_half_of_64_bits(type_name):
    a, b = ([RANDOM.getrandbits(64) for _ in range(60)] + [0, 1, 1 << 63, (1 << 64) - 1] for _ in range(2))

    def number(x: int) -> int:
        return signed(x, 64) if type_name == "s64" else x

    expected = [(number(x) * number(y) >> 64) & (1 << 64) - 1 for x, y in zip(a, b, strict=True)]
    assert apply(f"mul.hi.{type_name} {{d}}, {{a}}, {{b}};", "b64", ("b64", a), ("b64", b)) == expected


def test_carry_chain():
    body = "add.cc.u32 %r60, {a}, {b}; addc.u32 {d}, 0, 0;"
    assert apply(body, "b32", LEFT, RIGHT) == [(a + b) >> 32 for a, b in PAIRS]


@pytest.mark.parametrize("side", ["l", "r"])
@pytest.mark.parametrize("mode", ["wrap", "clamp"])
def test_funnel_shift(side, mode):
    def expected(low: int, high: int, count: int) -> int:
        count = count & 31 if mode == "wrap" else min(count, 32)
        value = high << 32 | low
        return (value << count >> 32 if side == "l" else value >> count) & MASK

    found = apply(f"shf.{side}.{mode}.b32 {{d}}, {{a}}, {{b}}, {{c}};", "b32", LEFT, RIGHT, THIRD)
    assert found == [expected(a, b, c) for (a, b), c in zip(PAIRS, THIRD[1], strict=True)]


@pytest.mark.parametrize("type_name", ["u32", "s32"])
def test_bit_field_extract(type_name):
    def expected(a: int, position: int, length: int) -> int:
        position, length = position & 255, length & 255
        value = s32(a) if type_name == "s32" else a
        field = value >> position
        if length < 32:
            field &= (1 << length) - 1
            if type_name == "s32" and length and position + length <= 32 and field >> (length - 1):
                field -= 1 << length
            elif type_name == "s32" and length and position + length > 32 and value < 0:
                field -= 1 << length
        return (field if length else 0) & MASK

    positions = [(a, p, n) for a in WORDS for p, n in ((0, 8), (4, 12), (30, 2), (0, 32), (31, 4), (7, 0), (40, 3))]
    operands = (("b32", [one[i] for one in positions]) for i in range(3))
    found = apply(f"bfe.{type_name} {{d}}, {{a}}, {{b}}, {{c}};", "b32", *operands)
    assert found == [expected(*one) for one in positions]
    constant = apply(f"bfe.{type_name} {{d}}, {{a}}, 5, 9;", "b32", LEFT)
    assert constant == [expected(a, 5, 9) for a in LEFT[1]]


def test_bit_field_insert():
    def expected(a: int, b: int, position: int, length: int) -> int:
        field = ((1 << length) - 1) << position & MASK
        return b & ~field | a << position & field

    for position, length in ((0, 8), (4, 12), (30, 2), (0, 32), (31, 4), (7, 0)):
        found = apply(f"bfi.b32 {{d}}, {{a}}, {{b}}, {position}, {length};", "b32", LEFT, RIGHT)
        assert found == [expected(a, b, position, length) for a, b in PAIRS]


def test_byte_permutation():
    def expected(a: int, b: int, selector: int) -> int:
        data, result = b << 32 | a, 0
        for i in range(4):
            nibble = selector >> 4 * i & 15
            byte = data >> 8 * (nibble & 7) & 255
            if nibble & 8:
                byte = 255 if byte & 128 else 0
            result |= byte << 8 * i
        return result

    found = apply("prmt.b32 {d}, {a}, {b}, {c};", "b32", LEFT, RIGHT, THIRD)
    assert found == [expected(a, b, c) for (a, b), c in zip(PAIRS, THIRD[1], strict=True)]


@pytest.mark.parametrize("table", [0x80, 0x96, 0x1B, 0xFF])
def test_lop3(table):
    def bit(a: int, b: int, c: int) -> int:
        return table >> (a << 2 | b << 1 | c) & 1

    found = apply(f"lop3.b32 {{d}}, {{a}}, {{b}}, {{c}}, {table};", "b32", LEFT, RIGHT, THIRD)
    for value, (a, b), c in zip(found, PAIRS, THIRD[1], strict=True):
        assert value == sum(bit(a >> i & 1, b >> i & 1, c >> i & 1) << i for i in range(32))


@pytest.mark.parametrize("type_name", ["u32", "s32"])
@pytest.mark.parametrize("comparison", COMPARISONS)
def test_comparisons(comparison, type_name):
    def number(x: int) -> int:
        return s32(x) if type_name == "s32" else x

    expected = [int(eval(f"{number(a)} {COMPARISONS[comparison]} {number(b)}")) for a, b in PAIRS]
    assert apply(f"setp.{comparison}.{type_name} {{d}}, {{a}}, {{b}};", "pred", LEFT, RIGHT) == expected


def test_predicates_combine():
    body = "setp.gt.u32 %p1, {c}, 5; setp.lt.and.u32 {d}, {a}, {b}, %p1;"
    expected = [int(a < b and c > 5) for (a, b), c in zip(PAIRS, THIRD[1], strict=True)]
    assert apply(body, "pred", LEFT, RIGHT, THIRD) == expected
    both = apply("setp.lt.u32 %p2|{d}, {a}, {b};", "pred", LEFT, RIGHT)
    assert both == [int(a >= b) for a, b in PAIRS]


def test_predicated_instructions_leave_other_lanes():
    body = "mov.u32 {d}, 7; setp.lt.u32 %p1, {a}, {b}; @%p1 add.u32 {d}, {a}, 1; @!%p1 add.u32 {d}, {d}, 2;"
    assert apply(body, "b32", LEFT, RIGHT) == [(a + 1 if a < b else 9) & MASK for a, b in PAIRS]


def test_packing_and_selection():
    packed = apply("mov.b64 {d}, {{{a}, {b}}};", "b64", LEFT, RIGHT)
    assert packed == [a | b << 32 for a, b in PAIRS]
    halves = apply("mov.b32 {{%h1, %h2}}, {a}; mov.b32 {d}, {{%h2, %h1}};", "b32", LEFT)
    assert halves == [a >> 16 | (a & 0xFFFF) << 16 for a in LEFT[1]]
    chosen = apply("setp.gt.s32 %p1, {a}, 0; selp.b32 {d}, {a}, {b}, %p1;", "b32", LEFT, RIGHT)
    assert chosen == [a if s32(a) > 0 else b for a, b in PAIRS]


@pytest.mark.parametrize("size", [8, 16])
def test_narrow_loads_extend(size):
    """A narrow load fills a wider register, with its sign where signed."""
    found = apply(
        f"st.shared.b32 [0], 0; st.shared.u{size} [0], {{a}}; ld.shared.s{size} {{d}}, [0];",
        "b32",
        ("b32", [0xF1F2F3F4] * 32),
    )
    assert found == [signed(0xF1F2F3F4, size) & MASK] * 32
