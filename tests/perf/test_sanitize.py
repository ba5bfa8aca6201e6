"""`python -m perf sanitize` with a script in place of compute-sanitizer that writes down its arguments."""

import re

import pytest

pytest.importorskip("triton")
from perf import gpu, sanitize
from perf.__main__ import main
from tritonattn.backends.triton import KERNELS

SCRIPT = """#!/bin/sh
case "$*" in
*--help*) echo "  {option} arg   filter" ;;
*) echo "$PYTORCH_NO_CUDA_MEMORY_CACHING $*" >> "{log}" ;;
esac
case "$*" in *"--tool {faulty} "*) exit 9 ;; esac
"""


@pytest.fixture
def install(monkeypatch, tmp_path):
    """install(faulty="racecheck"): a sanitizer on PATH whose one tool finds something; returns its log."""

    def put(faulty="nothing", option="--kernel-name"):
        script, log = tmp_path / "compute-sanitizer", tmp_path / "log"
        script.write_text(SCRIPT.format(option=option, log=log, faulty=faulty))
        script.chmod(0o755)
        monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
        return log

    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.version.hip", None)
    return put


@pytest.mark.parametrize("option", ["--kernel-name", "--kernel-regex"])
def test_every_tool_soaks_our_kernels(option, install, capsys):
    log = install(option=option)
    main(["sanitize", "--trials", "7", "--seed", "3", "--minutes", "2"])
    lines = log.read_text().splitlines()
    assert [line.split()[2] for line in lines] == ["memcheck", "racecheck", "synccheck"]
    for line in lines:
        assert line.startswith("1 --tool")
        assert "--error-exitcode 9" in line
        assert line.endswith("-m perf soak --bare --device cuda --minutes 2.0 --trials 7 --seed 3")
        for kernel in KERNELS.values():
            assert f"{option} kns={kernel.__name__} " in line
    assert capsys.readouterr().out.endswith("memcheck, racecheck, synccheck: no errors\n")


def test_findings_are_named(install):
    log = install(faulty="racecheck")
    with pytest.raises(SystemExit, match="sanitize: racecheck found errors"):
        main(["sanitize", "--tools", "memcheck,racecheck"])
    assert len(log.read_text().splitlines()) == 2


FINDINGS = (
    "Invalid __global__ write of size 4 bytes",
    "Error: Race reported between Write access at forward+0x3f0",
    "Barrier error detected. Divergent thread(s) in block",
    'Program hit CUDA_ERROR_INVALID_VALUE (error 1) due to "invalid argument" on CUDA API call to cuMemcpy.',
)
OTHERS = (
    "COMPUTE-SANITIZER",
    "    at forward+0x3f0",
    "Warning: Race reported between Write access at forward+0x3f0",
    "Error: process didn't terminate successfully",
    "Target application returned an error",
    "ERROR SUMMARY: 0 errors",
    "RACECHECK SUMMARY: 0 hazards displayed (0 errors, 0 warnings)",
)


@pytest.mark.parametrize("line", [*FINDINGS, *OTHERS])
def test_a_finding_is_told_from_its_log(line, tmp_path):
    """As where the time was up before the sanitizer could end with an error."""
    log = f"24 calls\n========= {line}\n"
    phases = [one for one in gpu.phases("cuda", tmp_path, "tests/kernels") if one.name in sanitize.TOOLS]
    assert [bool(re.search(one.failure, log, re.MULTILINE)) for one in phases] == [line in FINDINGS] * 3
    assert [one.limit for one in phases] == ["--minutes"] * 3


def test_without_a_sanitizer(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    with pytest.raises(SystemExit, match=r"compute-sanitizer is neither on PATH nor in \$CUDA_HOME/bin"):
        main(["sanitize"])
