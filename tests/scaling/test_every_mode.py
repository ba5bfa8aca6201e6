"""Every mode: dtypes, zeros, sizes and junk; that its two formulas agree holds tests/calls/test_check_scaling.py."""

import pytest
import torch

from tests.support.learned import small
from tests.support.masks import visible_pairs
from tests.support.pairs import pairwise
from tests.support.refusals import refuses
from tritonattn.core.statistics import Statistics
from tritonattn.core.visibility import Visibility
from tritonattn.scaling import SCALINGS, Scaling

B, HQ, SQ, SK, D = 2, 4, 6, 9, 5
NORM_MODES = ["key_norm_sum", "key_norm_mean", "key_norm_rms", "key_norm_max", "key_norm_l2", "cosine"]
PADDINGS = {
    "right": {"key_lengths": torch.tensor([4, 7])},
    "left": {"key_ranges": torch.tensor([[[3, SK]] * SQ, [[1, SK]] * SQ], dtype=torch.int32)},
}
every_mode = pytest.mark.parametrize("mode", SCALINGS)


def tensors():
    generator = torch.Generator().manual_seed(0)
    q = torch.randn(B, HQ, SQ, D, dtype=torch.float64, generator=generator)
    return q, torch.randn(B, 2, SK, D, dtype=torch.float64, generator=generator)


def per_query_head(x):
    return x.repeat_interleave(HQ // x.shape[1], 1)


def factor_of(scaling, q, k, **arguments):
    """The factor of every pair from scales(), [B, Hq, Sq, Sk]."""
    visibility = Visibility.of(q, k, **arguments)
    scales = scaling.scales(q, k, visibility, Statistics(k, visibility))
    factor = torch.full((B, HQ, q.shape[2], k.shape[2]), scales.constant, dtype=torch.float64)
    if scales.query is not None:
        factor = factor * per_query_head(scales.query)[..., None]
    return factor if scales.key is None else factor * per_query_head(scales.key)[:, :, None]


def multiplier_of(scaling, q, k, **arguments):
    visible = visible_pairs((B, HQ, q.shape[2], k.shape[2]), **arguments)
    return scaling.multiplier(q, per_query_head(k), visible).expand(visible.shape), visible


FORMULAS = {"scales": factor_of, "multiplier": lambda *a, **k: multiplier_of(*a, **k)[0]}


@every_mode
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_narrow_inputs_are_computed_wide(mode, dtype):
    q, k = (x.to(dtype) for x in tensors())
    ours = factor_of(small(mode), q, k, causal=True)
    theirs, visible = multiplier_of(small(mode), q, k, causal=True)
    exact = factor_of(small(mode), q.double(), k.double(), causal=True)
    assert theirs.dtype in (torch.float32, torch.float64)
    torch.testing.assert_close(ours[visible], exact[visible], rtol=1e-6, atol=0)
    torch.testing.assert_close(theirs[visible].double(), exact[visible], rtol=1e-6, atol=0)


@pairwise(mode=SCALINGS, formula=FORMULAS)
def test_zero_vectors_give_zero_and_no_nan(mode, formula):
    formula = FORMULAS[formula]
    q, k = tensors()
    q[:, :, 2] = 0
    k[:, :, :4] = 0
    q, k = q.requires_grad_(), k.requires_grad_()
    factor = formula(small(mode), q, k, causal=True, window=(2, 0))
    assert factor.isfinite().all()
    logit = (q @ per_query_head(k).mT) * factor
    gradients = torch.autograd.grad(logit.sum(), (q, k))
    assert all(gradient.isfinite().all() for gradient in gradients)
    if mode in NORM_MODES[:-1]:
        assert (factor[:, :, 0] == 0).all()  # row 0 attends to the keys 1 to 3
    if mode == "cosine":
        assert (factor[:, :, 2] == 0).all()
        assert (factor[..., :4] == 0).all()


@pairwise(mode=SCALINGS, formula=FORMULAS, junk=[float("nan"), float("inf")], padding=PADDINGS)
def test_keys_of_no_row_do_not_enter(mode, formula, junk, padding):
    formula, arguments = FORMULAS[formula], PADDINGS[padding]
    q, clean = tensors()
    visible = visible_pairs((B, HQ, SQ, SK), **arguments)
    unseen = ~visible[:, :2].any(-2)
    k = torch.where(unseen[..., None], junk, clean).requires_grad_()
    factor = torch.where(visible, formula(small(mode), q, k, **arguments), 0)
    assert torch.equal(factor, torch.where(visible, formula(small(mode), q, clean, **arguments), 0))
    if factor.requires_grad:
        (gradient,) = torch.autograd.grad(factor.sum(), k)
        assert gradient.isfinite().all()
        assert (gradient[unseen] == 0).all()


@pairwise(mode=SCALINGS, size=[1e30, 1e-30], dtype=[torch.float32, torch.bfloat16])
def test_huge_and_tiny_keys(mode, size, dtype):
    q, k = tensors()
    q, k = q.to(dtype), (k * size).to(dtype).requires_grad_()
    ours = factor_of(small(mode), q, k, causal=True)
    theirs, visible = multiplier_of(small(mode), q, k, causal=True)
    torch.testing.assert_close(ours[visible], theirs[visible].double(), rtol=1e-6, atol=0)
    if mode in NORM_MODES:
        assert (ours[visible] > 0).all()
        for factor in (ours, theirs):  # factor * size is of order 1, so its gradient is of order 1 / size
            (gradient,) = torch.autograd.grad((torch.where(visible, factor, 0) * size).sum(), k)
            assert gradient.isfinite().all()
            assert 1e-3 < gradient.double().abs().max() * size < 1e3


def test_scaling_asks_for_both_formulas():
    class Nothing(Scaling):
        name = "nothing"

    q, k = tensors()
    refuses("NotImplementedError: ~ Nothing must define scales", Nothing().scales, q, k, None, None)
    refuses("NotImplementedError: ~ Nothing must define multiplier", Nothing().multiplier, q, k, None)
