"""`python -m perf sanitize` with a script in place of compute-sanitizer that writes down its arguments."""

import pytest

pytest.importorskip("triton")
from perf.__main__ import main
from tritonattn.kernels import KERNELS

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
