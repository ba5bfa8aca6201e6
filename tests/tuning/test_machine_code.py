"""Loops are found in listings as nvdisasm and Triton write them."""

from __future__ import annotations

import pytest

triton = pytest.importorskip("triton")
from tritonattn.tuning.control_flow import innermost, loops, parse, parse_ptx  # noqa: E402

# A loop in a loop, whose wait retries out of line; the outer one has a spill of its own.
LISTING = """
.text.kernel:
        /*0000*/                   MOV R1, c[0x0][0x28] ;
.L_x_4:
        /*0010*/                   STL.64 [R1], R2 ;
.L_x_1:
        /*0020*/                   SYNCS.PHASECHK.TRANS64.TRYWAIT P2, [UR8], R4 ;
        /*0030*/              @!P2 BRA `(.L_x_2) ;
.L_x_3:
        /*0040*/                   HMMA.16816.F32.BF16 R4, R8, R12, R4 ;
        /*0050*/               @P0 BRA `(.L_x_1) ;
        /*0060*/                   BRA.U UP0, `(.L_x_4) ;
        /*0070*/                   EXIT ;
.L_x_2:
        /*0080*/                   SYNCS.PHASECHK.TRANS64.TRYWAIT P2, [UR8], R4 ;
        /*0090*/              @!P2 BRA `(.L_x_2) ;
        /*00a0*/                   BRA `(.L_x_3) ;
.L_x_5:
        /*00b0*/                   BRA `(.L_x_5);
"""

PTX = """
	bra.uni 	$L__BB0_2;
$L__BB0_3:
	@!%p9 bra 	$L__BB0_5;
$L__BB0_2:
	mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 { %r1 }, { %r2 }, { %r3 }, { %r4 };
	@%p2 bra 	$L__BB0_3;
	@%p7 tcgen05.mma.cta_group::1.kind::f16 [ %r1 + 0 ], %rd1, %rd2, %r3, %p3;
	bra.uni 	$L__BB0_3;
$L__BB0_5:
	wgmma.mma_async.sync.aligned.m64n64k16.f32.bf16.bf16 {%r1}, %rd1, %rd2, %p1, 1, 1, 0, 1;
	ret;
"""


def test_loops_of_a_listing():
    listing = parse(LISTING)
    addresses = [instruction.address for instruction in listing.instructions]
    assert addresses == list(range(0, 0xC0, 0x10))
    outer, inner, *retries = loops(listing)
    assert [hex(addresses[index]) for index in inner.body] == ["0x20", "0x30", "0x40", "0x50"]
    assert {addresses[index] for index in inner.indices - set(inner.body)} == {0x80, 0x90, 0xA0}
    assert outer.body[0] == 1
    assert outer.indices > inner.indices
    assert [len(span.body) for span in retries] == [2], "the branch to itself at the end is never reached"
    hot = {index for index, one in enumerate(listing.instructions) if one.name == "HMMA"}
    assert innermost([outer, inner, *retries], hot) == [inner]


def test_loops_of_ptx():
    source = parse_ptx(PTX)
    (loop,) = loops(source)
    assert [source.instructions[index].opcode.split(".")[0] for index in sorted(loop.indices)] == [
        "bra", "mma", "bra", "tcgen05", "bra",
    ]  # fmt: skip
