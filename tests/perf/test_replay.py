"""The replay of loops: each mechanism by itself, what listings say, and times that others published."""

from concurrent.futures import ThreadPoolExecutor

import pytest

from perf.__main__ import main
from perf.models.replay import command, times
from perf.models.replay.control import Control
from perf.models.replay.operations import Operation
from perf.models.replay.parameters import PARAMETERS
from perf.models.replay.scheduler import Scheduler, Timeline, Warps
from tests.support.versions import OLDER_TRITON
from tritonattn.backends.triton import launch
from tritonattn.tuning import Target, compile_kernel
from tritonattn.tuning.config import TileConfig

H100 = PARAMETERS["90"]


def high(stall: int, writes: int = 7, reads: int = 7, waits: int = 0) -> int:
    """The upper half of an instruction with a control code; 7 is no scoreboard."""
    return stall << 41 | writes << 46 | reads << 49 | waits << 52


def listing() -> str:
    """A loop as nvdisasm prints it, from 0x0010 to 0x0090; the poll at 0x0040 is the retry of the one before it."""
    poll = "SYNCS.PHASECHK.TRANS64.TRYWAIT P0, [UR8], R24"
    lines = [
        ("", "MOV R1, c[0x0][0x28]", high(5)),
        (".L_x_1:", "DEPBAR.LE SB0, 0x2", high(2)),
        ("", poll, high(1, writes=1, waits=0b100001)),
        ("", "@P0 BRA `(.L_x_2)", high(2)),
        ("", poll, high(1, writes=1)),
        (".L_x_2:", "FFMA R2, R3.reuse, R4, R5", high(2)),
        ("", "FFMA R6, R3, R4.64, UR5", high(2)),
        ("", "HGMMA.64x128x16.F32.BF16 R24, R88, gdesc[UR16], R24, gsb0", high(2)),
        ("", "LDGSTS.E.BYPASS.128 [R2], [R4.64]", high(2)),
        ("", "@!P1 BRA `(.L_x_1)", high(5)),
        ("", "EXIT", high(5)),
    ]
    text = ""
    for number, (label, instruction, word) in enumerate(lines):
        text += f"{label}\n" if label else ""
        text += f"        /*{16 * number:04x}*/    {instruction} ;    /* 0x{0:016x} */\n    /* 0x{word:016x} */\n"
    return text


def step(unit: str = "", act: str = "", stall: int = 1, **fields) -> Operation:
    control = Control(stall, fields.pop("writes", None), fields.pop("reads", None), fields.pop("waits", ()))
    return Operation(act or unit or "NOP", control, unit, act=act, **fields)


def timeline(*loop: Operation, programs: int = 1, each: int = 1, ahead: int = 0, loaded: int = 0, of=H100) -> Timeline:
    return Scheduler(list(loop), Warps(programs, each, ahead, loaded), of).run(16, 6)


# ---- Control codes and instructions


# ---- Mechanisms. A loop ends with 12 clocks of its back edge.


PRODUCT = step("wgmma", "product", turn=128, amount=1)
BARRIER = [step(act="barrier"), step()]
MECHANISMS = {
    "scoreboard": ([step("memory", turn=4, latency=29, writes=2), step("fp32", turn=1, stall=4, waits=(2,))], {}, 45),
    "wgmma": (10 * [PRODUCT], {}, 10 * 128),
    "products": ([PRODUCT, step(act="product wait")], {}, 17 + 128 + 65 + 1 + 12),
    "all but a group of products": ([PRODUCT, step(act="product wait", amount=1)], {}, 128),
    "barrier": (BARRIER, {"each": 2}, 1 + 30 + 1 + 1 + 12),
    "barrier of another program": (BARRIER, {"programs": 2}, 30 + 1 + 1 + 12),
    "turn": ([step(act="turn"), step("wgmma", "product", turn=20), step(act="pass"), step("fp32")], {"each": 2}, 64),
}


@pytest.mark.parametrize("name", MECHANISMS)
def test_clocks_of_a_loop_and_its_longest_wait(name):
    loop, warps, clocks = MECHANISMS[name]
    found = timeline(*loop, **warps)
    assert found.clocks == clocks
    assert " " in name or max(found.waits, key=found.waits.get) == name


# ---- Published times


def test_times_of_flash_attention_3():
    assert times.error_of_flash_attention_3(2048) <= 0.028
    assert times.error_of_flash_attention_3() <= 0.048


# ---- Compiled kernels


@pytest.mark.skipif(launch.interpreting, reason="TRITON_INTERPRET=1 leaves nothing to compile")
@pytest.mark.skipif(OLDER_TRITON, reason="figures of the code of triton 3.9")
def test_forward_on_an_h100(tmp_path, monkeypatch, capsys):
    """At 2 stages iterations wait for what the last one asked for; the command says so, and reads binaries too."""
    sm_90 = Target.parse("sm_90")
    wanted = [command.Case("forward", 64, sm_90, TileConfig(128, 64, 8, stages, True)) for stages in (2, 3)]
    results = {case: command.examine(case) for case in wanted}
    late, early = results.values()
    assert late.share == pytest.approx(0.39, rel=0.05)
    assert early.share == pytest.approx(0.58, rel=0.05)
    assert (late.awaits_last, early.awaits_last) == (True, False)
    assert late.waits["loads"] > 0.25 > early.waits.get("loads", 0.0)
    assert (late.products, late.is_serialised, late.programs, late.groups_in_flight) == (2, False, 2, None)
    monkeypatch.setattr(command, "cases", lambda *_: wanted)
    monkeypatch.setattr(command, "examine", results.__getitem__)
    monkeypatch.setattr(command, "ProcessPoolExecutor", lambda workers, context: ThreadPoolExecutor(workers))
    main(["replay", "--targets", "sm_90", "--head-dims", "64", "--stages", "2,3", "--workers", "1"])
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("| forward")]
    assert ["asks late" in line for line in lines] == [True, False]
    assert f"{late.share:.3f}" in lines[0]
    cubin = tmp_path / "forward.cubin"
    cubin.write_bytes(compile_kernel("forward", wanted[0].problem, wanted[0].config, sm_90).asm["cubin"])
    main(["replay", "--cubin", str(cubin), "--function", "forward"])
    assert len(capsys.readouterr().out.splitlines()) == 2 + 2
