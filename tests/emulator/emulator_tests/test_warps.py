"""Instructions of a whole warp: shuffles, votes, reductions, elections, matrices."""

from __future__ import annotations

import pytest
import torch
from ptx_emulator import PTXFault

from .ptx import apply, execute

LANES = list(range(32))
VALUES = [7 * lane * lane % 61 for lane in LANES]
OPERAND = ("b32", VALUES)


@pytest.mark.parametrize(
    ("mode", "step", "clamp", "source"),
    [
        ("bfly", 5, 31, lambda lane: lane ^ 5),
        ("up", 3, 0, lambda lane: lane - 3 if lane >= 3 else lane),
        ("down", 4, 31, lambda lane: lane + 4 if lane + 4 < 32 else lane),
        ("idx", 9, 31, lambda lane: 9),
        ("bfly", 3, 0x1C03, lambda lane: lane ^ 3),
        ("down", 2, 0x1803, lambda lane: lane + 2 if lane % 8 % 4 < 2 else lane),
    ],
)
def test_shuffle(mode, step, clamp, source):
    found = apply(f"shfl.sync.{mode}.b32 {{d}}, {{a}}, {step}, {clamp}, -1;", "b32", OPERAND)
    if clamp <= 31:
        assert found == [VALUES[source(lane)] for lane in LANES]
    else:  # segments of 4 or 8 lanes
        assert sorted(found[:4]) == sorted(VALUES[source(lane)] for lane in LANES[:4])


def test_shuffle_says_whether_the_lane_is_in_range():
    body = "shfl.sync.up.b32 %r60|%p1, {a}, 3, 0, -1; selp.b32 {d}, 1, 0, %p1;"
    assert apply(body, "b32", OPERAND) == [int(lane >= 3) for lane in LANES]


def test_shuffle_from_an_inactive_lane():
    body = "setp.lt.u32 %p1, %r0, 16; @!%p1 bra L; shfl.sync.bfly.b32 %r1, %r0, 16, 31, -1; L: mov.u32 %r2, 0;"
    assert "shfl reads a lane that is not active" in str(execute(body, torch.zeros(1)))


def test_votes():
    odd = [int(value % 2) for value in VALUES]
    bits = sum(bit << lane for lane, bit in enumerate(odd))
    start = "and.b32 %r60, {a}, 1; setp.eq.u32 %p1, %r60, 1; "
    assert apply(start + "vote.sync.ballot.b32 {d}, %p1, -1;", "b32", OPERAND) == [bits] * 32
    for mode, expected in (("any", any(odd)), ("all", all(odd)), ("uni", len(set(odd)) == 1)):
        assert apply(start + f"vote.sync.{mode}.pred {{d}}, %p1, -1;", "pred", OPERAND) == [int(expected)] * 32


def test_reductions():
    for mode, expected in (("add.u32", sum(VALUES)), ("max.s32", max(VALUES)), ("min.u32", min(VALUES))):
        assert apply(f"redux.sync.{mode} {{d}}, {{a}}, -1;", "b32", OPERAND) == [expected] * 32


def test_one_lane_is_elected():
    found = apply("elect.sync %r60|%p1, -1; selp.b32 {d}, 1, 0, %p1;", "b32", OPERAND)
    assert found == [1] + [0] * 31


# ---- matrices
FRAGMENT = """shl.b32 %r10, %r0, 4; mul.wide.u32 %rd10, %r0, 16; add.u64 %rd11, %rd1, %rd10;
    ld.global.v4.b32 {%r1, %r2, %r3, %r4}, [%rd11]; st.shared.v4.b32 [%r10], {%r1, %r2, %r3, %r4}; bar.sync 0;
    ldmatrix.sync.aligned.m8n8.x4.@shared.b16 {%r5, %r6, %r7, %r8}, [%r10];
    mul.wide.u32 %rd10, %r0, 4; add.u64 %rd12, %rd2, %rd10;
    st.global.b32 [%rd12], %r5; st.global.b32 [%rd12+128], %r6; st.global.b32 [%rd12+256], %r7;
    st.global.b32 [%rd12+384], %r8;"""


@pytest.mark.parametrize("transposed", [False, True])
def test_matrix_loads(transposed):
    """Lane 4g + t gets elements 2t and 2t + 1 of row g, or of column g, of each of the four matrices."""
    matrices = torch.arange(256, dtype=torch.int16).reshape(4, 8, 8)
    out = torch.zeros(4, 32, 2, dtype=torch.int16)
    assert execute(FRAGMENT.replace("@", "trans." if transposed else ""), matrices, out).ok
    expected = matrices.transpose(1, 2) if transposed else matrices
    assert torch.equal(out, expected.reshape(4, 32, 2))


@pytest.mark.parametrize("transposed", ["", "trans."])
def test_matrix_stores_are_the_inverse_of_loads(transposed):
    matrices = torch.arange(256, dtype=torch.int16).reshape(4, 8, 8)
    out = torch.zeros(32, 8, dtype=torch.int16)
    body = FRAGMENT.replace("@", transposed).split("mul.wide.u32 %rd10, %r0, 4")[0]
    body += f"""stmatrix.sync.aligned.m8n8.x4.{transposed}shared.b16 [%r10+512], {{%r5, %r6, %r7, %r8}}; bar.sync 0;
        ld.shared.v4.b32 {{%r1, %r2, %r3, %r4}}, [%r10+512]; add.u64 %rd12, %rd2, %rd10;
        st.global.v4.b32 [%rd12], {{%r1, %r2, %r3, %r4}};"""
    assert execute(body, matrices, out).ok
    assert torch.equal(out.reshape(4, 8, 8), matrices)


def test_collective_of_a_part_of_a_warp():
    body = "shl.b32 %r10, %r0, 4; st.shared.b32 [%r10], %r0; setp.lt.u32 %p1, %r0, 8; @!%p1 bra L;"
    body += "ldmatrix.sync.aligned.m8n8.x1.shared.b16 {%r5}, [%r10]; L: mov.u32 %r2, 0;"
    with pytest.raises(PTXFault, match="partly active warp"):
        execute(body, torch.zeros(1))


@pytest.mark.parametrize(("name", "dtype"), [("f16", torch.float16), ("bf16", torch.bfloat16)])
def test_matrix_product(name, dtype):
    """m16n8k16 with the fragments of the PTX manual: row g of A in lanes 4g .. 4g + 3, column g of B likewise."""
    random = torch.Generator().manual_seed(0)
    a, b = torch.randn(16, 16, generator=random).to(dtype), torch.randn(16, 8, generator=random).to(dtype)
    c = torch.randn(16, 8, generator=random)
    row, pair = torch.arange(32) // 4, torch.arange(32) % 4 * 2
    a_lanes = torch.stack(
        [a[row + 8 * (i % 2), pair + 8 * (i // 2) + j] for i in range(4) for j in range(2)], 1
    )  # [lane, register and half]
    b_lanes = torch.stack([b[pair + 8 * i + j, row] for i in range(2) for j in range(2)], 1)
    c_lanes = torch.stack([c[row + 8 * (i // 2), pair + i % 2] for i in range(4)], 1)
    out = torch.zeros(32, 4)
    body = f"""mul.wide.u32 %rd10, %r0, 16; add.u64 %rd11, %rd1, %rd10; add.u64 %rd13, %rd3, %rd10;
        add.u64 %rd14, %rd4, %rd10; mul.wide.u32 %rd10, %r0, 8; add.u64 %rd12, %rd2, %rd10;
        ld.global.v4.b32 {{%r1, %r2, %r3, %r4}}, [%rd11]; ld.global.v2.b32 {{%r5, %r6}}, [%rd12];
        ld.global.v4.b32 {{%r7, %r8, %r9, %r10}}, [%rd13];
        mma.sync.aligned.m16n8k16.row.col.f32.{name}.{name}.f32 {{%r7, %r8, %r9, %r10}}, {{%r1, %r2, %r3, %r4}},
            {{%r5, %r6}}, {{%r7, %r8, %r9, %r10}};
        st.global.v4.b32 [%rd14], {{%r7, %r8, %r9, %r10}};"""
    assert execute(body, a_lanes.contiguous(), b_lanes.contiguous(), c_lanes.contiguous(), out).ok
    expected = a.double() @ b.double() + c.double()
    found = torch.zeros(16, 8)
    for i in range(4):
        found[row + 8 * (i // 2), pair + i % 2] = out[:, i]
    torch.testing.assert_close(found.double(), expected, rtol=1e-6, atol=1e-6)
