"""Keys in pages on sm_80 and sm_90: the bits of the contiguous form where batch_invariant, and the bound elsewhere."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")
from tests.support.packed import Packed
from tests.support.paged_calls import paged_call
from tests.support.pairs import in_turn
from tritonattn.backends import triton as triton_backend
from tritonattn.tuning import TileConfig

from .executor import GPU

# From one new token to a whole prompt.
ROWS = Packed((1, 18, 0, 5), (40, 18, 3, 33), q_tail=2, k_tail=3)
TILES = {80: TileConfig(16, 16, 1, 3), 90: TileConfig(64, 16, 4, 2)}
FORMS = {
    "plain": {"dims": (64, 64), "heads": (4, 2)},
    "wide heads, a lost page": {"dims": (128, 128), "lost": (3, 1), "terms": ("key_scale",)},
    "a window": {"window": (17, None), "terms": ("query_scale", "sinks"), "dims": (40, 24)},
    "every term": {"terms": ("query_scale", "key_scale", "key_bias", "sinks"), "softcap": 1.5},
}


@in_turn(form=FORMS, page=[16, 21, 64], invariant=[True, False], dtype=[torch.bfloat16, torch.float16], on=[80, 90])
def test_pages(form, page, invariant, dtype, on, emulate):
    """The executor reports reads outside of tensors, so that slots without keys, which are NaN, are not the only test."""
    executor = emulate(GPU(on, descriptors=on == 90), TILES[on])
    calls = paged_call(ROWS, dtype, page, causal=True, invariant=invariant, **FORMS[form])
    found, expected = (triton_backend.forward(call, aux=True) for call in calls)
    assert executor.launched == ["attention_forward"] * 2
    for name, result in found._asdict().items():
        other = getattr(expected, name)
        assert torch.equal(result, other) if invariant else (result - other).abs().max() < 1e-2, name
