"""Triton's own sanitizers compiled into kernels: they launch, with the memory that they want. Nothing runs."""

from __future__ import annotations

import pytest
import torch

triton = pytest.importorskip("triton")
import tritonattn
from perf import instrument
from tests.support.versions import OLDER_TRITON, skip_without_stub
from tritonattn.backends.triton import launch
from tritonattn.tuning import TileConfig

SCRATCH = ("global_scratch_size", "profile_scratch_size")


def scratch(one) -> int:
    return sum(getattr(one.kernel.metadata, name, 0) for name in SCRATCH)


@pytest.mark.skipif(OLDER_TRITON, reason="of this compiler")
def test_instrumented_kernels_launch(monkeypatch):
    skip_without_stub()
    from tests.stub import installed

    monkeypatch.setattr(launch, "config_for", lambda *_: TileConfig(16, 16, 4, 1))
    q, launches, stub = torch.randn(1, 1, 24, 16, dtype=torch.bfloat16), [], installed()
    refused = len(stub.messages())
    with stub.active(90, launches.append):
        with instrument.instrumented("consan"):
            tritonattn.attention(q, q, q, backend="triton")
        tritonattn.attention(q, q, q, backend="triton")
    assert stub.messages()[refused:] == []
    assert [scratch(one) > 0 for one in launches] == [True, False]
