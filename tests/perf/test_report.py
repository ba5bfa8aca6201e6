"""Tables and charts of records."""

from dataclasses import replace

import pytest

pytest.importorskip("triton")
from perf.records import Record
from perf.report import tables
from tritonattn.core.provenance import Environment

HERE = Environment("Card X", None, "3.12", "2.11", "0.1", "abc123", "3.6", "python -m perf sweep --suite forward")
AXES = {"length": 1024, "head_dim": 64, "dtype": "bf16", "causal": True, "passes": "forward", "scaling": "dim"}
TIMES = {"median_ms": 2.0, "lower_ms": 1.9, "upper_ms": 2.1, "rounds": 25, "tflops": 300.0, "gbps": 150.0}
JUDGED = {"ratio": 1.0, "baseline": "tritonattn dim", "error": 1e-3, "bound": 4e-3}
CARD = {"clocks.sm": "1980 MHz", "temperature.gpu": "41"}
FORWARD = ("forward", AXES, "tritonattn dim", "dim", "measured", HERE, "2026-01-02")
OURS = Record(*FORWARD, **TIMES, **JUDGED, card=CARD)
PEER = replace(OURS, contestant="sdpa dim", median_ms=3.0, tflops=200.0, gbps=100.0, ratio=1.5)
ABSENT = Record("forward", AXES, "xformers dim", "dim", "skipped", HERE, "2026-01-02", reason="is not installed")


def ceiling(name, axes, **rates):
    return Record("ceilings", axes, name, "", "measured", HERE, "2026-01-02", median_ms=1.0, **rates)


CEILINGS = [
    ceiling("matmul", {"size": 8192, "dtype": "bf16"}, tflops=600.0),
    ceiling("copy", {"bytes": 2**30}, gbps=250.0),
]


def test_a_table_says_what_was_measured_where():
    text = tables([OURS, PEER, ABSENT, *CEILINGS])
    assert (
        "## forward\n\nMeasured: Card X, torch 2.11, triton 3.6, tritonattn 0.1, Python 3.12, commit abc123, "
        "`python -m perf sweep --suite forward`, 2026-01-02; clocks.sm 1980 MHz, temperature.gpu 41.\n" in text
    )
    row = next(line for line in text.splitlines() if "sdpa dim" in line)
    cells = " ".join(row.replace("|", " ").split())
    assert cells == "1024 64 bf16 yes fwd sdpa dim 3 1.9 - 2.1 200 100 1.500 1000 0.25"
    assert "to tritonattn dim." in text
    assert "modelled" not in text
    assert "- xformers: skipped in 1 cases: is not installed" in text
    emulated = replace(HERE, command="python -m perf sweep --suite forward --device emulate")
    text = tables([replace(OURS, environment=emulated)])
    assert "## forward\n\nEmulated (times mean nothing): Card X" in text
    assert "Measured" not in text


def test_modelled_times_stand_beside_the_measured_ones():
    text = tables([replace(OURS, modelled_ms=1.25), PEER])
    cells = [line.replace("|", " ").split() for line in text.splitlines() if line.startswith("|")]
    assert cells[2][6:12] == ["dim", "2", "1.9", "-", "2.1", "1.25"]
    assert cells[3][8:13] == ["1.9", "-", "2.1", "200", "100"], "no model of a peer"
