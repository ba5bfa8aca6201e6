"""Claims of docs/flexattention.md that say "tried": a torch that does more makes the page stale."""

import pytest
import torch
from torch.nn.attention import flex_attention as flex

from tests.support.versions import TORCH

pytestmark = pytest.mark.skipif(TORCH < (2, 13), reason="the page is about torch 2.13")


def test_no_gradient_on_a_cpu():
    q, k, v = torch.zeros(3, 1, 2, 16, 16, requires_grad=True)
    with pytest.raises(NotImplementedError, match="backward on CPU"):
        flex.flex_attention(q, k, v)


def test_two_statistics():
    assert flex.AuxRequest._fields == ("lse", "max_scores")
