"""`python -m perf preflight` on a stub of NVIDIA's driver: it passes, and each thing that is wrong ends it."""

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


def test_no_gpu():
    with pytest.raises(SystemExit, match="torch sees no GPU; nvidia-smi shows"):
        main(["preflight"])
