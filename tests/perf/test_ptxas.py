"""`python -m perf ptxas` with the ptxas that Triton brings, under two names."""

import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

triton = pytest.importorskip("triton")
from perf import ptxas
from perf.__main__ import main

OWN = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "ptxas"


def test_releases_side_by_side(tmp_path, monkeypatch, capsys):
    """Two kernels, by a thread in place of processes."""
    for release in ("12.8.1", "13.5.1"):
        tool = tmp_path / release / "nvidia" / "bin" / "ptxas"
        tool.parent.mkdir(parents=True)
        tool.symlink_to(OWN)
    for name in ("TRITON_PTXAS_PATH", "TRITON_PTXAS_BLACKWELL_PATH"):
        monkeypatch.setenv(name, "")  # and as it was in the end: a worker sets them

    def pool(workers: int, context: object, *start: Any) -> ThreadPoolExecutor:
        return ThreadPoolExecutor(workers, "ptxas", *start)

    cases = [one for one in ptxas.all_cases(("sm_80",), (64,)) if one.kernel in ("keys_seen", "decode_combine")]
    monkeypatch.setattr(ptxas, "ProcessPoolExecutor", pool)
    monkeypatch.setattr(ptxas, "all_cases", lambda *_: cases)
    file = tmp_path / "figures.json"
    options = "--releases 12.8.1,13.5.1 --targets sm_80 --head-dims 64"
    main(["ptxas", "--tools", str(tmp_path), *options.split(), "--workers", "1", "--json", str(file)])
    printed, records = capsys.readouterr().out, json.loads(file.read_text())
    assert len(records) == 4
    for record in records:
        assert record["registers"] > 0
        assert record["instructions"] > 10
        assert record["error"] == ""
        assert record["triton"] == triton.__version__
    assert "All releases agree on 2 of 2 kernels." in printed
    assert f"python -m perf ptxas {options}`" in printed
    lines = {line.split("|")[1].strip(): line for line in printed.splitlines() if line.startswith("| 1")}
    assert "known for wrong code" in lines["12.8.1"]
    assert "known" not in lines["13.5.1"]
