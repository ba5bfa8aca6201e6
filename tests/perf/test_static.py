"""Static figures: loops in machine code, and the gate that shipped entries pass."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from perf.models.static import machine_code
from perf.models.static.control_flow import innermost, loops, parse
from perf.models.static.gate import examine, gate_reasons
from perf.models.static.lanes import Lanes
from perf.models.static.machine_code import MachineCode, MmaLoop, read_machine_code
from tests.support.versions import OLDER_TRITON
from tritonattn.autotune import gate
from tritonattn.backends.triton import launch
from tritonattn.tuning import cache_dir
from tritonattn.tuning.config import Problem, Target, TileConfig
from tritonattn.tuning.defaults import default_config
from tritonattn.tuning.gpus import GPUS
from tritonattn.tuning.lookup import usable_table
from tritonattn.tuning.table import keys, read_table

SM_80, SM_90 = Target("cuda", "80"), Target("cuda", "90")
PROBLEM = Problem(64, 64, torch.bfloat16, right=True, query_scale=True)
CONFIG = TileConfig(128, 64, 4, 2)
compiled = pytest.mark.skipif(launch.interpreting, reason="TRITON_INTERPRET=1 leaves nothing to compile")


def code(spill: int = 0, exp: int = 64) -> MachineCode:
    mix = {"tensor": 128, "exp": exp, "fp32": 200, "integer": 400}
    loop = MmaLoop(mix, packed=0, tiles=1, flops=128 * 64 * 256, shared_bytes=65536)
    return MachineCode(128, 0, 49152, spill, 0, (loop,))


def test_the_gate():
    def reasons(found: MachineCode, target: Target = SM_80) -> str:
        return "; ".join(gate_reasons("forward", PROBLEM, CONFIG, target, found))

    assert reasons(code()) == ""
    [loop] = code().mma_loops
    spilling = {local: replace(loop, instructions=loop.instructions | {"local": local}) for local in (15, 17)}
    spills = {local: reasons(replace(code(spill=8), mma_loops=(one,))) for local, one in spilling.items()}
    assert spills == {15: "", 17: "spills 8 bytes a thread in a loop"}, "of 792 other instructions"
    assert "spills 8 bytes" in reasons(MachineCode(300, 0, 0, 8, 0, None), Target("hip", "gfx942"))
    serialised = replace(loop, products=2, product_waits=24)
    assert "waits 24 times for 2 products" in reasons(replace(code(), mma_loops=(serialised,)))
    assert reasons(replace(code(), mma_loops=(replace(serialised, product_waits=2),))) == ""
    assert "1.75 exponentials a logit" in reasons(code(exp=128)), "2 less those of 4 lanes of 4 warps for a row of 64"
    assert reasons(code(exp=80)) == "", "1.25, of which 0.25 correct earlier sums"
    assert "1.25 exponentials a logit" in gate_reasons("grad_query", PROBLEM, CONFIG, SM_80, code(exp=80))[0]
    assert gate_reasons("decode", PROBLEM, CONFIG, SM_80, code(exp=80)) == [], "of few rows lanes repeat them"
    unrolled = replace(loop, instructions=loop.instructions | {"exp": 128}, tiles=2)
    assert reasons(replace(code(), mma_loops=(unrolled,))) == ""
    assert "no loop" in reasons(MachineCode(128, 0, 0, 0, 0, ()))
    assert "tensor memory" in reasons(MachineCode(128, 0, 0, 0, 1024, code().mma_loops)), "memory_reasons are there"


@compiled
def test_exponentials_of_a_softcap_and_repeated_ones():
    """Else no config of a softcap would pass; one that repeats them still does not, as 8 warps on 64 rows of wgmma."""
    [reason] = examine("forward", PROBLEM, TileConfig(64, 64, 8, 2), SM_90).reasons
    assert "warps repeat each other's softmax" in reason
    capped = replace(PROBLEM, softcap=True)
    assert examine("grad_query", capped, default_config("grad_query", capped, SM_80), SM_80).reasons == ()
    assert "2.00 exponentials a logit" in gate_reasons("grad_query", capped, CONFIG, SM_80, code(exp=384))[0]


TABLES = {gpu: read_table(cache_dir.shipped_tables() / f"{gpu.name}.json") for gpu in GPUS}
ENTRIES = [(gpu, key) for gpu, table in TABLES.items() for key in keys() if key in table.entries]


@compiled
def test_a_shipped_entry_passes_the_gate():
    check_shipped_entry(0)


def check_shipped_entry(position: int) -> None:
    """Check the entry at a position of all tables; they hold for the code of triton 3.9."""
    if OLDER_TRITON:
        pytest.skip("the tables are of another compiler's code")
    gpu, key = ENTRIES[position]
    entry = usable_table(cache_dir.shipped_tables() / f"{gpu.name}.json", gpu.target).entries[key]
    assert examine(key.kernel, key.problem, entry.config, gpu.target).reasons == ()


# A loop in a loop, whose wait retries out of line; the outer one has a spill.
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


@pytest.fixture
def machine_code_of(monkeypatch):
    """Read a listing as that of a program of 4 warps with one product."""

    def read(listing):
        monkeypatch.setattr(gate, "read_binary", lambda *_: " REG:96 STACK:16 SHARED:0")
        monkeypatch.setattr(machine_code, "disassemble", lambda cubin: listing)
        ptx = "$L__BB0_1:\n\tmma.sync.aligned.m16n8k16 {%r1};\n\t@%p1 bra \t$L__BB0_1;\n\tret;\n"
        metadata = SimpleNamespace(shared=4096, num_warps=4, tmem_size=64)
        return read_machine_code(SimpleNamespace(metadata=metadata, asm={"cubin": b"", "ptx": ptx}))

    return read


def test_spills_are_those_inside_of_loops(machine_code_of):
    """Code that lies before and after them runs once."""
    once = "        /*0008*/                   STL.128 [R1], R4 ;\n"
    found = machine_code_of(LISTING.replace(".L_x_4:\n", once + ".L_x_4:\n"))
    assert (found.registers, found.stack_bytes, found.shared_bytes, found.spill_bytes) == (96, 16, 4096, 8)
    assert found.tensor_memory == 64
    [loop] = found.mma_loops
    assert (loop.tiles, loop.flops, loop.other) == (1, 4 * 4096, 3)


# The loads of a loop; R0 holds a thread's number, R50 a stage that is the same for all lanes.
LOADS = """
.text.kernel:
        /*0000*/                   S2R R0, SR_TID.X ;
        /*0010*/                   LOP3.LUT R2, R0, 0x3, RZ, 0xc0, !PT ;
        /*0020*/                   SHF.R.U32.HI R3, RZ, 0x2, R0 ;
        /*0030*/                   LOP3.LUT R5, R0, 0x1d, RZ, 0xc0, !PT ;
        /*0040*/                   SHF.R.U32.HI R9, RZ, 0x5, R0 ;
        /*0050*/                   LOP3.LUT R6, R0, 0xfffffffc, RZ, 0x3c, !PT ;
        /*0060*/                   IMAD.MOV.U32 R50, RZ, RZ, RZ ;
.L_x_1:
        /*0070*/                   VIADD R50, R50, 0x1 ;
        /*0080*/                   ISETP.GT.AND P5, PT, R50, 0x1, PT ;
        /*0090*/                   SEL R50, R50, RZ, !P5 ;
        /*00a0*/                   LEA R51, R50, UR35, 0x8 ;
        /*00b0*/                   IMAD R7, R9, 0x40, R51 ;
        /*00c0*/                   LDS.128 R60, [R51+UR32+0x30000] ;
        /*00d0*/                   LDS.128 R64, [R7] ;
        /*00e0*/                   LDS.128 R72, [R3.X16] ;
        /*00f0*/                   LDS.128 R76, [R5.X16] ;
        /*0100*/                   LDS.128 R68, [R2.X16+UR33+0x12000] ;
        /*0110*/                   LDS.128 R68, [R6.X16] ;
        /*0120*/              @!P5 IADD3 R51, P1, PT, R0, 0x1, RZ ;
        /*0130*/                   LDS.128 R60, [R51] ;
        /*0134*/                   MOV R7, R2 ;
        /*0136*/              @!P5 MOV R7, R50 ;
        /*0138*/                   LDS.128 R60, [R7+0x10] ;
        /*0140*/                   LDS R84, [R3.X4] ;
        /*0150*/              @!PT LDS RZ, [RZ] ;
        /*0160*/                   HMMA.16816.F32.BF16 R88, R8, R12, R88 ;
        /*0170*/                   SHFL.IDX PT, R53, R50, R50, 0x1f ;
        /*0180*/               @P0 BRA `(.L_x_1) ;
        /*0190*/                   EXIT ;
"""
READ_IN_PAIRS = {
    "[R51+UR32+0x30000]": True,  # by all lanes
    "[R7]": True,  # by the lanes of a warp
    "[R3.X16]": True,  # by 4 lanes in a row
    "[R5.X16]": True,  # by lanes n and n + 2
    "[R2.X16+UR33+0x12000]": False,  # by every 4th lane
    "[R6.X16]": False,
    "[R51]": False,  # unless P5 holds
    "[R7+0x10]": False,  # if P5 holds
}


def test_loads_of_one_address_by_pairs_of_lanes():
    listing = parse(LOADS)
    lanes = Lanes(listing)
    loads = {
        one.operands.split(", ")[1]: index for index, one in enumerate(listing.instructions) if one.opcode == "LDS.128"
    }
    assert {operands: lanes.read_in_pairs(index) for operands, index in loads.items()} == READ_IN_PAIRS
    shuffled = parse(LOADS.replace("SHFL.IDX PT, R53", "SHFL.IDX PT, R50"))
    assert not Lanes(shuffled).read_in_pairs(loads["[R51+UR32+0x30000]"]), "another lane's stage comes around"


def test_loads_bring_two_registers_a_clock_to_pairs_of_lanes(machine_code_of):
    """4 of 8 loads of 16 bytes do; one of 4 bytes brings one register in any case, one that never runs none."""
    found = machine_code_of(LOADS)
    assert found.unmasked_loop.shared_bytes == 4 * (4 * 2 + 4 * 4 + 1) * 128
    assert found.unmasked_loop.operand_bytes == 0
