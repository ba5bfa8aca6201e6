"""`python -m perf gpu` on a stub driver: its first phase, the order and time of all, and what follows a failure."""

from dataclasses import replace

import pytest

from perf.__main__ import main
from perf.cases.records import read
from perf.gpu import gpu
from tests.support.versions import skip_without_stub

SWEEPS = ("ceilings", "forward", "backward", "decode", "dims", "overhead")
PYTHON = {"fails": "raise SystemExit(3)", "works": "print('worked')", "hangs": "import time; time.sleep(600)"}


def phase(name, share=1.0, **options):
    return gpu.Phase(name, ("-c", PYTHON[name]), share, **options)


@pytest.mark.slow
def test_the_first_phase(tmp_path, monkeypatch, capsys):
    check_phase("environment", tmp_path, monkeypatch, capsys)


def check_phase(name, tmp_path, monkeypatch, capsys) -> None:
    """Rehearse a phase, launches by Triton's launcher on a stub driver, and all that it leaves."""
    skip_without_stub()
    phases = gpu.phases("emulate", tmp_path, "tests/kernels/test_config_in_use.py")
    short = [replace(one, command=(*one.command, "--minutes", "0.02"), limit=None) for one in phases]
    monkeypatch.setattr(gpu, "phases", lambda *_: short if name == "soak" else phases)
    main(["gpu", "--device", "emulate", "--minutes", "8", "--out", str(tmp_path), "--phases", name])
    log = (tmp_path / f"{name}.log").read_text()
    assert f"{name}: done after " in capsys.readouterr().out
    assert (tmp_path / "phases.txt").read_text().startswith(f"{name}: done")
    if name in SWEEPS:
        records = read(tmp_path / f"{name}.jsonl")
        assert {record.suite for record in records} == {"ceilings", name}
        assert any(record.median_ms for record in records)
        modelled = {bool(one.modelled_ms) for one in records if one.contestant.startswith("tritonattn")}
        assert modelled == ({True} if name != "ceilings" else set())
        assert {record.axes["backend"] for record in records if record.suite != "ceilings"} == {"triton"}
    else:
        said = {
            "environment": "torch: ",
            "stages": "emulated: times mean nothing",
            "compile": "kernels in ",
            "derivatives": "grad_query_second/64/query+key/long, bfloat16: within the bound",
            "correctness": " passed",
            "soak": "within the bound",
            "invariance": "sm_80: {'equal': 1} of 1 cases",
            "tuning": "decode/64/",
        }
        assert said[name] in log
    if name == "tuning":
        assert list(tmp_path.glob("tables/autotune/*.json"))


def test_a_run_goes_on_behind_what_was_done(tmp_path, monkeypatch):
    every = [phase("works"), phase("works", again=True), phase("fails"), phase("hangs")]
    chosen = [replace(one, name=name) for one, name in zip(every, "abcd", strict=True)]
    ran = []

    def execute(one, out, seconds, grace):
        ran.append(one.name)
        return gpu.Outcome(one, {"c": "failed", "d": "out of time"}.get(one.name, "done"), 0.0)

    monkeypatch.setattr(gpu, "execute", execute)
    for commit, wanted in (("one", "abcd"), ("one", "bcd"), ("other", "abcd")):
        monkeypatch.setattr(gpu, "commit", lambda commit=commit: commit)
        ran.clear()
        found = gpu.run_all(chosen, tmp_path, 600.0)
        assert "".join(ran) == wanted
        assert [one.phase.name for one in found if one.status == "done before"] == ["a"] * ("a" not in wanted)


@pytest.mark.parametrize("required", [False, True])
def test_a_phase_that_fails_is_reported_and_the_next_one_runs(required, tmp_path, monkeypatch, capsys):
    """Unless it is required, as the preflight: its last line says what to do."""
    failing = gpu.Phase("fails", ("-c", "raise SystemExit('apt-get install gcc')"), 1.0, required=required)
    monkeypatch.setattr(gpu, "phases", lambda *_: [failing, phase("works")])
    with pytest.raises(SystemExit, match="gpu: fails failed: see the logs"):
        main(["gpu", "--device", "emulate", "--minutes", "1", "--out", str(tmp_path)])
    printed = capsys.readouterr()
    assert ("works: done" in printed.out.splitlines()[-1]) == (not required)
    assert ("apt-get install gcc" in printed.err) == required
    assert required or "worked" in (tmp_path / "works.log").read_text()


def test_a_phase_that_hangs_is_stopped(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu, "_SECONDS_OF_BRIEF", 1.0)
    found = gpu.run_all([phase("hangs"), phase("works", share=0.0)], tmp_path, gpu._SECONDS_TO_STOP + 2.0)
    assert [outcome.status for outcome in found] == ["out of time", "done"]
    said = phase("hangs", failure=r"^\$ .*sleep\(\d+\)")  # which is in its log, as its command
    found = gpu.run_all([said], tmp_path, gpu._SECONDS_TO_STOP + 1.0)
    assert found[0].status == "failed"
