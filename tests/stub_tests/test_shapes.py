"""Launches of unusual shapes: the driver takes each, with the parameters of the call. No kernel runs."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")
import tritonattn


def test_more_programs_than_triton_counts(stub):
    """65,535 sequences, all but the last empty, 128 heads, and 258 blocks of rows: no axis is too long."""
    sequences, heads, longest = 65_535, 128, 33_000
    starts = torch.zeros(sequences + 1, dtype=torch.int32)
    starts[-1] = longest
    q = torch.randn(1, 1, 16, dtype=torch.bfloat16).expand(longest, heads, 16)
    seen = []
    with stub.active(90, seen.append):
        tritonattn.attention_varlen(q, q, q, starts, starts, longest, longest, backend="triton")
    assert len(seen) == 2
    programs = [blocks * of_heads * members for _, (blocks, of_heads, members), *_ in seen]
    assert max(programs) < 2**31 <= sum(programs)
    assert sum(one.grid[2] for one in seen) == sequences
