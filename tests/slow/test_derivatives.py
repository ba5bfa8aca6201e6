"""Few-step models at the length of the images that they are trained on, and the shapes of a test of theirs."""

import pytest
import torch

from tests.backends.test_tangents import check
from tests.docs.test_derivatives import SCALINGS, assert_as_eager
from tests.support.pairs import in_turn
from tritonattn.core.call import AttentionCall
from tritonattn.core.terms import Terms
from tritonattn.core.visibility import Visibility

pytestmark = pytest.mark.filterwarnings("ignore:.torch.jit.script")


@in_turn(loss=["mean flow", "through the tangent"], scaling=SCALINGS)
def test_few_step_models_of_1670_tokens(loss, scaling):
    assert_as_eager(loss, scaling, 1670)


# (Sq, Sk, D, Dv, causal) of tests of a jvp in github.com/NVlabs/rcm, flash_attention_jvp_triton.py, commit 20207e56.
OF_RCM = [
    (1024, 1024, 64, 64, True),
    (999, 999, 64, 64, False),
    (256, 1024, 64, 128, False),
    (1000, 15, 128, 32, False),
    (512, 512, 16, 32, False),
    (515, 999, 16, 32, False),
]


@in_turn(shape=OF_RCM, dtype=[torch.float16, torch.bfloat16])
def test_shapes_of_rcm(shape, dtype):
    """Their operands too; gradients through the tangent are ours alone."""
    q_len, k_len, dim, value_dim, causal = shape
    random = torch.Generator().manual_seed(20)
    sizes = (q_len, dim), (k_len, dim), (k_len, value_dim)
    q, k, v = (torch.randn(1, 2, *size, generator=random, dtype=torch.float64) / 2 for size in sizes)
    check(AttentionCall(q, k, v, Visibility.of(q, k, causal=causal), Terms(0.5), backend="sdpa"), dtype=dtype)
