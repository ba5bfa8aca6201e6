"""`python -m perf ptxas` with the ptxas that Triton brings, under two names."""

import json
from pathlib import Path

import pytest

triton = pytest.importorskip("triton")
from perf import ptxas
from perf.__main__ import main

OWN = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "ptxas"


@pytest.fixture
def tools(tmp_path, monkeypatch) -> Path:
    """Two releases; two kernels are assembled."""
    for release in ("12.8.1", "13.5.1"):
        tool = tmp_path / release / "nvidia" / "bin" / "ptxas"
        tool.parent.mkdir(parents=True)
        tool.symlink_to(OWN)
    cases = ptxas.all_cases
    monkeypatch.setattr(
        ptxas, "all_cases", lambda *of: [one for one in cases(*of) if one.kernel in ("keys_seen", "decode_combine")]
    )
    return tmp_path


def assemble(tools: Path, releases: str) -> list[dict]:
    file = tools / "figures.json"
    options = ["--tools", str(tools), "--releases", releases, "--targets", "sm_80", "--head-dims", "64"]
    main(["ptxas", *options, "--workers", "1", "--json", str(file)])
    return json.loads(file.read_text())


def test_every_kernel_is_assembled():
    kernels = {case.kernel for case in ptxas.all_cases(("sm_90",), (64,))}
    assert kernels == set(ptxas.KERNELS)


def test_releases_side_by_side(tools, capsys):
    records = assemble(tools, "12.8.1,13.5.1")
    printed = capsys.readouterr().out
    assert len(records) == 4
    for record in records:
        assert record["registers"] > 0
        assert record["instructions"] > 10
        assert record["error"] == ""
        assert record["triton"] == triton.__version__
    assert "All releases agree on 2 of 2 kernels." in printed
    assert "python -m perf ptxas --releases 12.8.1,13.5.1 --targets sm_80 --head-dims 64`" in printed
    lines = {line.split("|")[1].strip(): line for line in printed.splitlines() if line.startswith("| 1")}
    assert "known for wrong code" in lines["12.8.1"]
    assert "known" not in lines["13.5.1"]
