"""`python -m perf preflight` on a stub of NVIDIA's driver: it passes, and each thing that is wrong ends it."""

import argparse
import re

import pytest

pytest.importorskip("triton")
from perf import preflight
from perf.__main__ import main
from perf.devices import kernels_on
from tests.support.versions import skip_without_stub


@pytest.fixture(autouse=True)
def _stub() -> None:
    skip_without_stub()


def stopped(monkeypatch, **broken) -> str:
    """The reason why a preflight with these checks broken ends."""
    for name, check in broken.items():
        monkeypatch.setattr(preflight, name, check)
    with pytest.raises(SystemExit) as found:
        preflight.run(argparse.Namespace(device="emulate"))
    return str(found.value)


def test_every_kernel_launches(capsys):
    with kernels_on("emulate", 90) as device:
        assert re.fullmatch(r"13 kernels in \d+ launches", preflight.check_every_kernel(device))


def test_every_check_is_printed_as_it_passes(monkeypatch, capsys):
    for name in ("check_results", "check_every_kernel"):
        monkeypatch.setattr(preflight, name, lambda device: "right")
    main(["preflight", "--device", "emulate"])
    lines = capsys.readouterr().out.splitlines()
    assert [line.partition(":")[0] for line in lines[:-1]] == ["compiler", "ptxas", "driver", "results", "kernels"]
    assert lines[-1] == "kernels run here, and are right"


def test_no_compiler(monkeypatch, tmp_path, capsys):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CC", raising=False)
    assert "apt-get install gcc, or set CC" in stopped(monkeypatch)
    assert capsys.readouterr().out == ""
    monkeypatch.setenv("CC", "no-such-compiler")
    assert "CC=no-such-compiler, which is not there" in stopped(monkeypatch)


def test_an_older_driver_than_the_code(monkeypatch):
    monkeypatch.setattr(preflight, "ptxas_version", lambda capability: "14.1.5")
    assert re.search(r"driver: it knows CUDA 13, and ptxas 14\.1\.5 .*install a newer driver", stopped(monkeypatch))


def test_a_ptxas_known_for_wrong_code_is_named(monkeypatch):
    monkeypatch.setattr(preflight, "ptxas_version", lambda capability: "12.8.93")
    found = stopped(monkeypatch, check_results=lambda device: preflight.attempt("bf16", _differs))
    assert "bf16: a wrong result: expected 1, got 2" in found
    assert "perf sanitize" in found
    assert "ptxas 12.8.93: CUDA 12.8's is known for" in found


def _differs() -> None:
    raise AssertionError("expected 1, got 2")


def test_no_gpu():
    with pytest.raises(SystemExit, match="torch sees no GPU; nvidia-smi shows"):
        main(["preflight"])
