"""How far q travels: the files of the package in which a function holds it while a call runs."""

import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")
import tritonattn
from tritonattn.backends.triton import launch

PACKAGE = Path(tritonattn.__file__).parent


def test_a_call_of_q_passes_few_files(monkeypatch):
    monkeypatch.setattr(launch, "run", lambda *_: None)
    q, k, v = torch.randn(3, 1, 2, 32, 16)
    files: set[str] = set()

    def watch(frame, event, argument):
        path = Path(frame.f_code.co_filename)
        if PACKAGE in path.parents and any(value is q for value in frame.f_locals.values()):
            files.add(path.relative_to(PACKAGE).as_posix())

    before = sys.getprofile()
    sys.setprofile(watch)  # calls and returns
    try:
        tritonattn.attention(q, k, v, scaling="key_count", causal=True, backend="triton")
    finally:
        sys.setprofile(before)
    assert {"calls/attention.py", "backends/triton/attention.py", "backends/triton/launch.py"} <= files
    assert len(files) <= 9, sorted(files)
