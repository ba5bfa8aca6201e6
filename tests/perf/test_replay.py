"""The replay of loops: times that others published, and what it says of a compiled kernel."""

from concurrent.futures import ThreadPoolExecutor

import pytest

from perf.__main__ import main
from perf.models.replay import command, times
from tests.support.versions import OLDER_TRITON
from tritonattn.backends.triton import launch
from tritonattn.tuning import Target, compile_kernel
from tritonattn.tuning.config import TileConfig


def test_times_of_flash_attention_3():
    assert times.error_of_flash_attention_3(2048) <= 0.028
    assert times.error_of_flash_attention_3() <= 0.048


@pytest.mark.slow
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
