"""cp.async: what it copies, and every misuse of it."""

from __future__ import annotations

import pytest
import torch
from ptx_emulator import PTXFault
from ptx_emulator.parse import parse
from ptx_emulator.program import Program

from .ptx import execute, module

# Thread t copies 16 bytes, elements 4t .. 4t + 3, to the same position in shared memory.
ISSUE = """shl.b32 %r10, %r0, 4; mul.wide.u32 %rd10, %r0, 16; add.u64 %rd11, %rd1, %rd10;
    cp.async.cg.shared.global [%r10], [%rd11], 16; cp.async.commit_group;"""
WAIT = "cp.async.wait_group 0;"
STORE = """add.u64 %rd12, %rd2, %rd10; ld.shared.v4.b32 {%r1, %r2, %r3, %r4}, [%r10];
    st.global.v4.b32 [%rd12], {%r1, %r2, %r3, %r4};"""


def tensors(threads: int = 32) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.arange(4.0 * threads), torch.zeros(4 * threads)


def test_copies_arrive():
    x, out = tensors()
    assert execute(ISSUE + WAIT + STORE, x, out).ok
    assert torch.equal(out, x)


def test_the_rest_of_a_short_copy_is_zero():
    x, out = tensors()
    short = ISSUE.replace("cp.async.cg", "shl.b32 %r11, %r0, 2; min.u32 %r11, %r11, 16; cp.async.cg")
    assert execute(short.replace("], 16;", "], 16, %r11;") + WAIT + STORE, x, out).ok
    expected = x.reshape(-1, 4) * (torch.arange(4) < torch.arange(32)[:, None])
    assert torch.equal(out, expected.flatten())


def test_a_copy_of_no_bytes_reads_nothing():
    x, out = tensors()
    nothing = ISSUE.replace("], 16;", "], 16, 0;")
    assert execute(nothing + WAIT + STORE, x[:4], out).ok
    assert (out == 0).all()
    with pytest.raises(PTXFault, match="out-of-bounds"):
        execute(ISSUE + WAIT + STORE, x[:4], out)


def test_read_before_the_wait():
    report = execute(ISSUE + STORE + WAIT, *tensors())
    assert "read of a cp.async destination before wait_group" in str(report)


def test_wait_for_an_older_group_only():
    report = execute(ISSUE + "cp.async.wait_group 1;" + STORE, *tensors())
    assert "before wait_group" in str(report)
    assert execute(ISSUE + "cp.async.commit_group; cp.async.wait_group 1;" + STORE, *tensors()).ok


def test_wait_all_takes_uncommitted_copies():
    uncommitted = ISSUE.replace("cp.async.commit_group;", "")
    assert execute(uncommitted + "cp.async.wait_all;" + STORE, *tensors()).ok
    assert not execute(uncommitted + WAIT + STORE, *tensors()).ok


def test_write_before_the_wait():
    report = execute(ISSUE + "st.shared.b32 [%r10], %r0;" + WAIT, *tensors())
    assert "write of a cp.async destination before wait_group" in str(report)


def test_copy_over_a_pending_copy():
    report = execute(ISSUE + ISSUE + WAIT, *tensors())
    assert "cp.async write of a cp.async destination before wait_group" in str(report)
    assert execute(ISSUE + WAIT + ISSUE + WAIT, *tensors()).ok


def test_another_warp_needs_a_barrier_after_the_wait():
    other = "xor.b32 %r10, %r10, 512;" + STORE
    assert "read-after-write" in str(execute(ISSUE + WAIT + other, *tensors(64), threads=64))
    assert execute(ISSUE + WAIT + "bar.sync 0;" + other, *tensors(64), threads=64).ok
    assert not execute(ISSUE + "bar.sync 0;" + WAIT + other, *tensors(64), threads=64).ok


def test_copy_over_what_another_warp_still_reads():
    body = "shl.b32 %r10, %r0, 4; st.shared.b32 [%r10], %r0; bar.sync 0; xor.b32 %r11, %r10, 512;"
    body += "ld.shared.b32 %r12, [%r11]; {barrier}" + ISSUE + WAIT
    assert "cp.async write-after-read" in str(execute(body.format(barrier=""), *tensors(64), threads=64))
    assert execute(body.format(barrier="bar.sync 0;"), *tensors(64), threads=64).ok


def test_two_threads_copy_to_one_position():
    body = ISSUE.replace("[%r10], [%rd11]", "[0], [%rd11]")
    assert "cp.async write-write (same instruction)" in str(execute(body + WAIT, *tensors()))


def test_any_instruction_can_be_left_out():
    """A run without one reports what the text without it does; later runs have the whole kernel again."""
    parts = [*ISSUE.split(";")[:-1], *WAIT.split(";")[:-1], *STORE.split(";")[:-1]]
    text = "".join(f"{part};" for part in parts)
    instructions = parse(module(text, 2)).instructions
    first = next(one.index for one in instructions if one.base == "shl")
    assert len(parts) == len(instructions) - first - 1  # ret
    for number in range(len(parts)):
        left, whole = tensors(), tensors()
        rest = "".join(f"{part};" for part in (*parts[:number], *parts[number + 1 :]))
        outcomes = [_outcome(rest, tensors()), _outcome(text, left, without=[first + number])]
        assert outcomes[0] == outcomes[1], parts[number]
        assert execute(text, *whole).ok
        assert torch.equal(whole[0], whole[1])


def test_a_run_without_an_instruction_translates_its_block_alone(monkeypatch):
    """The others are those of the whole kernel."""
    body = ISSUE + "bar.sync 0;" + WAIT + STORE
    assert execute(body, *tensors()).ok
    translated, translate = [], Program._compile
    monkeypatch.setattr(Program, "_compile", lambda self, *of: translated.append(of) or translate(self, *of))
    copy = next(one.index for one in parse(module(body, 2)).instructions if one.base == "cp")
    execute(body, *tensors(), without=[copy])
    assert translated == [(0, False)]


def _outcome(body: str, given: tuple[torch.Tensor, torch.Tensor], **options) -> tuple:
    """The category of a fault, or how many findings there are, by text."""
    try:
        report = execute(body, *given, **options)
    except PTXFault as error:
        return (error.category,)
    return tuple((found["text"], found["count"]) for found in report.problems())
