"""Forward and backward kernels of sm_80 and sm_90: every mask, scale, dtype and form, small and default tiles."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")
from tritonattn.tuning import TileConfig

from .cases import Case
from .checking import check

CAPABILITIES = (80, 90)
HALF, BFLOAT, SINGLE = torch.float16, torch.bfloat16, torch.float32
SMALL = TileConfig(16, 16, 1, 2)  # short sequences have inner blocks, edges and tails
WARPGROUP = TileConfig(64, 16, 4, 2)  # the smallest that wgmma takes
SCALE = ("query_scale",)
SCALES = ("query_scale", "key_scale")

FAST = (
    Case(BFLOAT, tiles=SMALL, mask="causal", scales=SCALES),
    Case(HALF, tiles=SMALL, mask="everything", scales=SCALE, kv_heads=2, group=1),
    Case(SINGLE, tiles=SMALL, mask="causal window", scales=SCALES, batch=1),
    Case(BFLOAT, 40, 24, TileConfig(32, 16, 2, 1), "ranges", q_len=50, k_len=33),
    Case(HALF, 64, tiles=WARPGROUP, mask="causal lengths", scales=SCALE, q_len=70, k_len=60, batch=1, group=3),
    Case(BFLOAT, 64, mask="causal", scales=SCALE, q_len=150, k_len=200, batch=1, group=1),
    Case(HALF, 128, 64, mask="window", scales=SCALES, q_len=130, k_len=140, batch=1, group=1),
)


@pytest.mark.parametrize("capability", CAPABILITIES)
@pytest.mark.parametrize("case", FAST, ids=str)
def test_attention(case, capability, emulate):
    executor = emulate(capability, case.tiles)
    check(case)
    assert len(executor.reports) >= 4  # forward, row terms, both backward kernels
