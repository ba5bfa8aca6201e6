"""Keys in pages on sm_80 and sm_90: the bits of the contiguous form where batch_invariant."""

from __future__ import annotations

import pytest
import torch

from tests.support.packed import Packed
from tests.support.paged_calls import check_appends, paged_call
from tritonattn.backends import triton as triton_backend
from tritonattn.tuning import TileConfig

from .executor import GPU

# From one new token to a whole prompt.
ROWS = Packed((1, 18, 0, 5), (40, 18, 3, 33), q_tail=2, k_tail=3)
TILES = {80: TileConfig(16, 16, 1, 3), 90: TileConfig(64, 16, 4, 2)}
TERMS = ("key_scale", "key_bias", "sinks")
CASES = {
    "key heads shared, terms": (80, torch.bfloat16, 21, {"dims": (40, 24), "heads": (4, 2), "terms": TERMS}),
    "a window, a lost page": (90, torch.float16, 64, {"dims": (32, 32), "lost": (3, 0), "window": (17, None)}),
}


@pytest.mark.parametrize("name", CASES)
def test_pages(name, emulate):
    """The contiguous keys are loaded by descriptors on sm_90."""
    capability, dtype, page, form = CASES[name]
    executor = emulate(GPU(capability, descriptors=capability == 90), TILES[capability])
    calls = paged_call(ROWS, dtype, page, causal=True, invariant=True, **form)
    found, expected = (triton_backend.forward(call, aux=True) for call in calls)
    assert executor.launched == ["attention_forward"] * 2
    assert (executor.executed("tma") > 0) == (capability == 90)
    for result, other in zip(found, expected, strict=True):
        assert torch.equal(result, other)


def test_appended_norms(emulate):
    executor = emulate(GPU(90))
    check_appends(torch.bfloat16, 24)
    assert executor.launched == ["key_norms_kernel", "append_to_pages_kernel"] * 5
