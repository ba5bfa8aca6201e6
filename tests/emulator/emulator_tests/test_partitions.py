"""Kernels whose warps run different code: orders of warps, named barriers, mbarriers, the register pool, races."""

from __future__ import annotations

import pytest
import torch
from ptx_emulator import PTXError, Report
from ptx_emulator.partitions import POLICIES

from .ptx import execute

# Warps 0-3 write shared memory and arrive at an mbarrier; warps 4-7 wait for it, read and store.
HANDOVER = """
and.b32 %r1, %r0, 127;
shl.b32 %r2, %r1, 2;
mul.wide.u32 %rd2, %r1, 4;
add.s64 %rd3, %rd1, %rd2;
mov.b32 %r3, 512;
setp.eq.b32 %p1, %r0, 0;
@%p1 mbarrier.init.shared::cta.b64 [%r3], 1;
barrier.sync 0;
shr.u32 %r4, %r0, 7;
TABLE: .branchtargets WRITE, READ;
brx.idx %r4, TABLE;
READ:
setmaxnreg.dec.sync.aligned.u32 24;
{wait}
ld.shared.b32 %r5, [%r2];
st.global.b32 [%rd3], %r5;
ret;
WRITE:
setmaxnreg.inc.sync.aligned.u32 {registers};
st.shared.b32 [%r2], %r1;
{meet}
@%p1 mbarrier.arrive.shared::cta.b64 _, [%r3];
"""
WAIT = "LOOP: mbarrier.try_wait.parity.shared::cta.b64 %p3, [%r3], 0;\n@!%p3 bra LOOP;"


def hand_over(
    policy: str = "round-robin", wait: str = WAIT, meet: str = "bar.sync 1, 128;", registers: int = 104
) -> tuple[Report, torch.Tensor]:
    out = torch.full((128,), -1, dtype=torch.int32)
    body = HANDOVER.format(wait=wait, meet=meet, registers=registers)
    report = execute(body, out, threads=256, most_registers=64, policy=policy, seed=1)
    return report, out


@pytest.mark.parametrize("policy", POLICIES)
def test_handover_is_ordered(policy):
    report, out = hand_over(policy)
    assert report.ok, str(report)
    assert out.tolist() == list(range(128))


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("left_out", ["wait", "meet"])
def test_race_is_found_in_every_order(policy, left_out):
    """Without the barrier of the writers three of their warps are not ordered before the one arrival."""
    report, _ = hand_over(policy, **{left_out: ""})
    assert report.races or report.uninitialised


@pytest.mark.parametrize(
    ("options", "position"),
    [({"meet": "bar.sync 1, 256;"}, "bar.sync 1, 256"), ({"registers": 112}, "setmaxnreg.inc.sync.aligned.u32 112")],
)
def test_deadlock_names_the_positions(options, position):
    """A barrier that too few reach; registers beyond the pool, of 256 threads with 64 each."""
    with pytest.raises(PTXError, match=f"deadlock: every warp waits(.|\\n)*{position}"):
        hand_over(**options)


@pytest.mark.parametrize(
    ("meet", "message"),
    [
        ("bar.sync 1, 96;", "barrier 1: expected 96 threads, got 128"),
        ("and.b32 %r7, %r0, 32;\nadd.s32 %r7, %r7, 128;\nbar.sync 1, %r7;", "expected 128 and 160 threads, got 128"),
    ],
)
def test_barrier_with_other_counts_than_threads(meet, message):
    with pytest.raises(PTXError, match=message):
        hand_over(meet=meet)


PADDED = """
shl.b32 %r1, %r0, 3;
st.shared.b32 [%r1], %r0;
setmaxnreg.dec.sync.aligned.u32 24;
ld.shared.v2.b32 {%r2, %r3}, [%r1];
"""


@pytest.mark.parametrize(("used", "problems"), [("%r2", 0), ("%r3", 1)])
def test_padding_that_nobody_uses_may_be_loaded(used, problems):
    out = torch.zeros(128, dtype=torch.int32)
    store = f"mul.wide.u32 %rd2, %r0, 4;\nadd.s64 %rd3, %rd1, %rd2;\nst.global.b32 [%rd3], {used};"
    report = execute(PADDED + store, out, threads=128, most_registers=64)
    assert len(report.uninitialised) == problems
    if not problems:
        assert out.tolist() == list(range(128))


# Lanes from 7 on leave at a branch; the join, where the warp shuffles, stands before the block that they go to.
JOIN_FIRST = """
shl.b32 %r1, %r0, 2;
setmaxnreg.dec.sync.aligned.u32 24;
setp.gt.u32 %p1, %r0, 6;
mov.b32 %r2, 1;
@%p1 bra FAR;
JOIN:
shfl.sync.bfly.b32 %r3, %r2, 16, 31, -1;
mul.wide.u32 %rd2, %r0, 4;
add.s64 %rd3, %rd1, %rd2;
st.global.b32 [%rd3], %r3;
ret;
FAR:
mov.b32 %r2, 2;
bra JOIN;
"""


@pytest.mark.parametrize("policy", POLICIES)
def test_warp_meets_at_a_join_before_it_goes_on(policy):
    out = torch.zeros(32, dtype=torch.int32)
    report = execute(JOIN_FIRST, out, most_registers=64, policy=policy)
    assert report.ok, str(report)
    values = [1 if lane <= 6 else 2 for lane in range(32)]
    assert out.tolist() == [values[lane ^ 16] for lane in range(32)]
