"""Faults and races of plain accesses: each is provoked, and its harmless neighbour is not reported."""

from __future__ import annotations

import pytest
import torch
from ptx_emulator import PTXError, PTXFault, scheduler

from .ptx import execute

ADDRESS = "mul.wide.u32 %rd10, %r0, 4; add.u64 %rd11, %rd1, %rd10;"  # of element `thread` of the first tensor
SHARED = "shl.b32 %r10, %r0, 2;"  # of word `thread`


def tensor(*shape: int) -> torch.Tensor:
    return torch.arange(torch.Size(shape).numel(), dtype=torch.float32).reshape(shape)


# ---- bounds and alignment
def test_access_past_the_end():
    with pytest.raises(PTXFault) as raised:
        execute(f"{ADDRESS} ld.global.b32 %r1, [%rd11+4];", tensor(32))
    fault = raised.value
    assert (fault.category, fault.thread, fault.cta) == ("out-of-bounds", 31, (0, 0, 0))
    assert "0 bytes past the end of arg 0 p1 float32[32]" in fault.nearest
    execute(f"{ADDRESS} ld.global.b32 %r1, [%rd11];", tensor(32))


def test_access_before_the_start():
    with pytest.raises(PTXFault, match="4 bytes before the start of arg 0"):
        execute(f"{ADDRESS} st.global.b32 [%rd11+-4], %r0;", tensor(32))


def test_gaps_of_a_view_are_out_of_bounds():
    padded = tensor(4, 16)[:, :8]
    body = "mov.u32 %r1, 8; setp.lt.u32 %p1, %r0, %r1; mul.wide.u32 %rd10, %r0, 4; add.u64 %rd11, %rd1, %rd10;"
    assert execute(f"{body} @%p1 ld.global.b32 %r2, [%rd11];", padded).ok
    with pytest.raises(PTXFault, match="out-of-bounds: 4-byte read by 8 threads"):
        execute(f"{body} @%p1 ld.global.b32 %r2, [%rd11+32];", padded)


def test_wide_access_across_the_end():
    body = "ld.global.v4.b32 {%r1, %r2, %r3, %r4}, [%rd1+16];"
    assert execute(body, tensor(8)).ok
    with pytest.raises(PTXFault, match="out-of-bounds"):
        execute(body, tensor(7))


def test_misaligned_access():
    with pytest.raises(PTXFault, match="misaligned: 8-byte access"):
        execute("ld.global.b64 %rd20, [%rd1+4];", tensor(8))
    with pytest.raises(PTXFault, match="misaligned: 8-byte shared access"):
        execute("st.shared.b64 [4], %rd1;", tensor(8))


def test_null_pointer():
    with pytest.raises(PTXFault, match="null or wild pointer"):
        execute("mov.u64 %rd20, 0; ld.global.b32 %r1, [%rd20];", tensor(8))


def test_access_outside_shared_memory():
    assert execute("st.shared.b32 [60], %r0;", tensor(1), shared=64).ok
    with pytest.raises(PTXFault, match="the kernel has 64 bytes"):
        execute("st.shared.b32 [64], %r0;", tensor(1), shared=64)


def test_predicated_off_accesses_are_none():
    body = "mov.u64 %rd20, 0; setp.ne.u32 %p1, %r0, %r0; @%p1 ld.global.b32 %r1, [%rd20];"
    assert execute(body, tensor(8)).ok


def test_collected_faults_read_nan():
    x, out = tensor(32), torch.zeros(32)
    report = execute(
        f"{ADDRESS} ld.global.b32 %r1, [%rd11+4]; add.u64 %rd12, %rd2, %rd10; st.global.b32 [%rd12], %r1;",
        x,
        out,
        collect=True,
    )
    assert [found["line"] for found in report.faults.values()]
    assert out[31].isnan()
    assert torch.equal(out[:31], x[1:])


# ---- reads before writes
def test_uninitialised_shared_memory():
    report = execute(f"{SHARED} ld.shared.b32 %r1, [%r10];", tensor(1))
    assert "read of uninitialised shared memory" in report.problems()[0]["message"]
    assert execute(f"{SHARED} st.shared.b32 [%r10], %r0; ld.shared.b32 %r1, [%r10];", tensor(1)).ok


def test_uninitialised_register():
    report = execute(f"{ADDRESS} st.global.b32 [%rd11], %r77;", tensor(32))
    assert "read of uninitialised register %r77" in report.problems()[0]["message"]


def test_half_that_is_packed_and_dropped():
    """LLVM packs an undefined register next to a value, and unpacks the value alone."""
    body = ADDRESS + "mov.b64 %rd20, {{%r0, %r77}}; mov.b64 {taken}, %rd20; {use}"
    assert execute(body.format(taken="{%r1, _}", use="st.global.b32 [%rd11], %r1;"), tensor(32)).ok
    for taken, use in (
        ("{%r1, %r2}", ""),
        ("{_, %r1}", ""),
        ("{%r1, _}", "st.global.b32 [%rd1], %rd20;"),
        ("{%r1, _}", "mov.b64 {%r2, %r3}, %rd20;"),
    ):
        message = execute(body.format(taken=taken, use=use), tensor(32)).problems()[0]["message"]
        assert "read of uninitialised register %r77" in message


def test_register_written_on_one_path_only():
    body = "setp.lt.u32 %p1, %r0, 16; @%p1 mov.u32 %r1, 5; {guard} add.u32 %r2, %r1, 1;"
    assert not execute(body.format(guard=""), tensor(1)).ok
    assert execute(body.format(guard="@!%p1 mov.u32 %r1, 6;"), tensor(1)).ok


# ---- shared races
def neighbour(barrier: str) -> str:
    """Every thread writes its word, then reads that of the thread 32 further on."""
    return f"""{SHARED} st.shared.b32 [%r10], %r0; {barrier}
        add.u32 %r11, %r10, 128; and.b32 %r11, %r11, 255; ld.shared.b32 %r12, [%r11];"""


def test_read_after_write():
    report = execute(neighbour(""), tensor(1), threads=64)
    (race,) = report.races.values()
    assert "shared read-after-write race" in race["message"]
    assert "against PTX line" in race["message"]
    assert execute(neighbour("bar.sync 0;"), tensor(1), threads=64).ok
    assert execute(neighbour("barrier.sync 0;"), tensor(1), threads=64).ok


def test_write_after_read():
    body = f"""{SHARED} st.shared.b32 [%r10], %r0; bar.sync 0; xor.b32 %r11, %r10, 128;
        ld.shared.b32 %r12, [%r11]; {{barrier}} st.shared.b32 [%r10], %r12;"""
    report = execute(body.format(barrier=""), tensor(1), threads=64)
    assert [race["message"].split(" race")[0] for race in report.races.values()] == ["shared write-after-read"]
    assert execute(body.format(barrier="bar.sync 0;"), tensor(1), threads=64).ok


def test_write_after_write():
    body = "st.shared.b32 [0], %r0;"
    report = execute(body, tensor(1), threads=64)
    assert "shared write-write (same instruction) race" in str(report)
    assert not report.ok
    benign = execute("mov.u32 %r1, 3; st.shared.b32 [0], %r1;", tensor(1), threads=64)
    assert benign.ok
    assert benign.benign


def test_lanes_of_one_warp_do_not_race():
    assert execute(neighbour("").replace("128", "4").replace("255", "127"), tensor(1), threads=32).ok


def test_atomics_do_not_race():
    body = "setp.ne.u32 %p1, %r0, 0; @%p1 bra L; st.shared.b32 [0], 0; L: bar.sync 0; atom.shared.add.u32 %r1, [0], 1;"
    tail = " bar.sync 0; ld.shared.b32 %r2, [0]; st.global.b32 [%rd1], %r2;"
    count = torch.zeros(1, dtype=torch.int32)
    assert execute(body + tail, count, threads=64).ok
    assert count.item() == 64
    assert not execute(body + tail.replace("bar.sync 0;", ""), count, threads=64).ok


def test_divergent_barrier_is_noted():
    body = "setp.lt.u32 %p1, %r0, 32; @%p1 bra L; bar.sync 0; bra E; L: bar.sync 0; E: mov.u32 %r1, 0;"
    report = execute(body, tensor(1), threads=64)
    assert "divergent barrier" in str(report.notes)


def test_threads_that_returned_hold_no_barrier_up():
    body = "setp.lt.u32 %p1, %r0, 32; @%p1 bra W; bra E; W: bar.sync 0; st.global.b32 [%rd1], %r0; E: mov.u32 %r1, 0;"
    assert execute(body.replace("[%rd1]", "[%rd11]").replace("W: bar", f"W: {ADDRESS} bar"), tensor(64), threads=64).ok


def test_endless_loop_of_some_threads(monkeypatch):
    monkeypatch.setattr(scheduler, "_MOST_DIVERGENT_BLOCKS", 5000)
    with pytest.raises(PTXError, match="no progress after 5001 divergent blocks"):
        execute("setp.eq.u32 %p1, %r0, 0; L: @%p1 bra L;", tensor(1), threads=32)


def test_trap():
    with pytest.raises(PTXError, match="trap reached"):
        execute("trap;", tensor(1))


# ---- global races
def test_two_ctas_write_one_element():
    body = "mov.u32 %r1, %ctaid.x; setp.eq.u32 %p1, %r0, 0; @%p1 st.global.b32 [%rd1], %r1;"
    report = execute(body, tensor(1), grid=2)
    assert "global write-after-write race" in str(report) or "same instruction" in str(report)
    assert not report.ok
    assert execute(body, tensor(1), grid=1).ok


def test_one_cta_reads_what_another_writes():
    body = """mov.u32 %r1, %ctaid.x; mul.wide.u32 %rd20, %r1, 4; add.u64 %rd20, %rd1, %rd20;
        st.global.b32 [%rd20], %r1; xor.b32 %r1, %r1, 1; mul.wide.u32 %rd20, %r1, 4; add.u64 %rd20, %rd1, %rd20;
        ld.global.b32 %r2, [%rd20];"""
    assert "global read-after-write race" in str(execute(body, tensor(2), grid=2))


def test_warps_of_one_cta_race_in_global_memory():
    body = f"""{ADDRESS} st.global.b32 [%rd11], %r0; {{barrier}} xor.b32 %r1, %r0, 32; mul.wide.u32 %rd10, %r1, 4;
        add.u64 %rd11, %rd1, %rd10; ld.global.b32 %r2, [%rd11];"""
    assert not execute(body.format(barrier=""), tensor(64), threads=64).ok
    assert execute(body.format(barrier="bar.sync 0;"), tensor(64), threads=64).ok


def test_views_of_one_storage_share_memory():
    """The second argument overlaps the first: a write through one races with another CTA's through the other."""
    x = tensor(64)
    body = "mov.u32 %r1, %ctaid.x; setp.eq.u32 %p1, %r1, 0; @%p1 st.global.b32 [%rd1+128], %r1; "
    body += "@!%p1 st.global.b32 [%rd2], %r1;"
    assert not execute(body, x, x[32:], grid=2).ok
    assert execute(body, x, tensor(32), grid=2).ok


# ---- counters
def test_sectors_and_bank_conflicts():
    report = execute(f"{ADDRESS} ld.global.b32 %r1, [%rd11];", tensor(32))
    assert report.global_memory["ld.global"]["sectors_per_request"] == 4
    assert report.global_memory["ld.global"]["sector_use"] == 1
    strided = execute(ADDRESS.replace("4;", "32;", 1) + " ld.global.b32 %r1, [%rd11];", tensor(32, 8))
    assert strided.global_memory["ld.global"]["sectors_per_request"] == 32
    assert execute(f"{SHARED} st.shared.b32 [%r10], %r0;", tensor(1)).shared_memory["st.shared"]["conflict_degree"] == 1
    conflicting = execute("shl.b32 %r10, %r0, 7; st.shared.b32 [%r10], %r0;", tensor(1))
    assert conflicting.shared_memory["st.shared"]["conflict_degree"] == 32
    half = execute("shl.b32 %r10, %r0, 3; st.shared.b32 [%r10], %r0;", tensor(1))
    assert half.shared_memory["st.shared"]["conflict_degree"] == 2


def test_counts_of_executed_instructions():
    body = "add.u32 %r1, %r0, 1; setp.lt.u32 %p1, %r0, 32; @%p1 bra L; add.u32 %r1, %r1, 1; L: bar.warp.sync -1;"
    report = execute(body, tensor(1), threads=64)
    assert report.counts["int"] == 3
    assert report.ctas == 1
