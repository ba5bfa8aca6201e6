"""`python -m perf preflight` on a stub of NVIDIA's driver: it passes, and each thing that is wrong ends it.

tests/slow/test_perf.py launches its kernels.
"""

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


def test_every_check_is_printed_as_it_passes(monkeypatch, capsys):
    for name in ("check_results", "check_every_kernel", "check_invariance"):
        monkeypatch.setattr(preflight, name, lambda device: "right")
    main(["preflight", "--device", "emulate"])
    lines = capsys.readouterr().out.splitlines()
    names = ["compiler", "ptxas", "driver", "results", "kernels", "invariance"]
    assert [line.partition(":")[0] for line in lines[:-1]] == names
    assert lines[-1] == "kernels run here, and are right"


def _differs() -> None:
    raise AssertionError("expected 1, got 2")


def _raises() -> None:
    raise RuntimeError("an illegal memory access was encountered")


@pytest.mark.parametrize(
    ("change", "check", "message"),
    [
        ({"PATH": "/none"}, None, "apt-get install gcc, or set CC"),
        ({"CC": "no-such-compiler"}, None, "CC=no-such-compiler, which is not there"),
        ("/none", None, "apt-get install python3-dev"),
        ("14.1.5", None, r"driver: it knows CUDA 13, and ptxas 14\.1\.5 .*install a newer driver"),
        ("12.8.93", _differs, "bf16: a wrong result: expected 1, got 2.*perf sanitize.*12.8's is known for"),
        (None, _raises, "bf16: RuntimeError: an illegal memory access.*CUDA_LAUNCH_BLOCKING=1"),
    ],
)
def test_each_fault_says_what_to_do(change, check, message, monkeypatch):
    with kernels_on("emulate", 90):  # which has its driver compiled
        monkeypatch.delenv("CC", raising=False)
    for name in ("check_every_kernel", "check_invariance"):
        monkeypatch.setattr(preflight, name, lambda device: "")
    monkeypatch.setattr(preflight, "check_results", lambda device: check and preflight.attempt("bf16", check))
    if isinstance(change, dict):
        for name, value in change.items():
            monkeypatch.setenv(name, value)
    elif change == "/none":
        monkeypatch.setattr(preflight.sysconfig, "get_paths", lambda *_, **__: {"include": change})
    elif change:
        monkeypatch.setattr(preflight, "ptxas_version", lambda capability: change)
    with pytest.raises(SystemExit) as stop:
        main(["preflight", "--device", "emulate"])
    assert re.search(message, str(stop.value), re.DOTALL)
