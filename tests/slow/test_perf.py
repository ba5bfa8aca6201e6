"""The preflight, some long phases of `python -m perf gpu`, and plots and reports of every suite."""

import re
from functools import partial

import pytest
import torch

pytest.importorskip("triton")
from perf.__main__ import main
from perf.gpu import preflight
from perf.sweep.plot import CHARTS
from perf.sweep.suites import SUITES
from tests.perf.commands import sweep
from tests.perf.conftest import _no_search_for_garbage, _threads_as_before  # noqa: F401  fixtures of sweeps
from tests.perf.test_gpu import check_phase
from tests.support.tiles import quick_config
from tests.support.versions import skip_without_stub
from tritonattn.lab.figures import save

PHASES = "stages derivatives correctness soak invariance tuning overhead".split()


@pytest.mark.filterwarnings("ignore:.torch.jit.script")  # of torch's derivatives
def test_preflight(monkeypatch, capsys):
    """With small tiles, in one dtype."""
    skip_without_stub()
    monkeypatch.setattr(preflight, "default_config", quick_config)
    monkeypatch.setattr(preflight, "DTYPES", (torch.bfloat16,))
    main(["preflight", "--device", "emulate"])
    printed = capsys.readouterr().out
    assert "results: bfloat16 by pointers, bfloat16 by descriptors" in printed
    assert re.search(r"kernels: 18 kernels in \d+ launches", printed)
    assert re.search(r"invariance: \d+ launches", printed)
    assert printed.endswith("kernels run here, and are right\n")


@pytest.mark.parametrize("name", PHASES)
def test_phases(name, tmp_path, monkeypatch, capsys):
    check_phase(name, tmp_path, monkeypatch, capsys)


def test_plots_and_reports_of_every_suite(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("perf.sweep.plot.save", partial(save, dpi=20))
    file = tmp_path / "a.jsonl"
    sweep(file, "--suite", ",".join(SUITES), "--scalings", "key_norm_max", "--peers", "sdpa")
    main(["plot", str(file), "--out", str(tmp_path / "plots")])
    assert {path.stem for path in (tmp_path / "plots").iterdir()} == {one.name for one in CHARTS}
    for path in (tmp_path / "plots").iterdir():
        assert path.read_bytes().startswith(b"\x89PNG")
    capsys.readouterr()
    main(["report", str(file), "--out", str(tmp_path / "new" / "report.md")])
    printed = capsys.readouterr().out
    assert printed == (tmp_path / "new" / "report.md").read_text()
    for suite in SUITES:
        assert f"## {suite}\n\nMeasured: " in printed
