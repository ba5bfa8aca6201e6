"""The reference against the textbook: one row at a time, only the visible keys, in fp64."""

import math

import pytest
import torch

from tests.support.masks import MASKS, visible_pairs
from tests.support.pairs import pairwise
from tritonattn.backends.reference import attention
from tritonattn.core.dropout import Dropout
from tritonattn.core.terms import Terms
from tritonattn.core.visibility import Visibility
from tritonattn.scaling import SCALINGS

B, HQ, HKV, SQ, SK, D, DV = 2, 4, 2, 6, 9, 5, 3


def tensors(dtype=torch.float64, q_len=SQ, k_len=SK, seed=0):
    generator = torch.Generator().manual_seed(seed)
    shapes = [(B, HQ, q_len, D), (B, HKV, k_len, D), (B, HKV, k_len, DV)]
    return [torch.randn(shape, dtype=torch.float64, generator=generator).to(dtype) for shape in shapes]


def textbook(q, k, v, multiplier, visible, softcap=None, sinks=None, keep=None, p=0.0):
    """out, lse, max_logit, entropy by a loop over rows that never touches an invisible key."""
    out = q.new_zeros(*q.shape[:-1], v.shape[-1])
    lse, max_logit, entropy = (q.new_full(q.shape[:-1], value) for value in (-math.inf, -math.inf, 0.0))
    for b, h, i in torch.cartesian_prod(*(torch.arange(n) for n in q.shape[:3])).tolist():
        keys = visible[b, h, i].nonzero().flatten()
        if len(keys) == 0:
            continue
        group = h // (q.shape[1] // k.shape[1])
        logit = multiplier.expand(visible.shape)[b, h, i, keys] * (k[b, group, keys] @ q[b, h, i])
        max_logit[b, h, i] = logit.max()
        capped = logit if softcap is None else softcap * torch.tanh(logit / softcap)
        lse[b, h, i] = torch.logsumexp(capped, 0)
        entropy[b, h, i] = torch.distributions.Categorical(logits=capped).entropy()
        entries = capped if sinks is None else torch.cat([capped, sinks[b, h, i, None]])
        probability = torch.softmax(entries, 0)[: len(keys)]
        if keep is not None:
            probability = probability * keep[b, h, i, keys] / (1 - p)
        out[b, h, i] = probability @ v[b, group, keys]
    return out, lse, max_logit, entropy


@pairwise(name=MASKS, softcap=[None, 0.7], with_sinks=[False, True], p=[0.0, 0.4])
def test_is_the_textbook(name, softcap, with_sinks, p):
    arguments = MASKS[name](B, HQ, SQ, SK)
    visible = visible_pairs((B, HQ, SQ, SK), **arguments)
    q, k, v = tensors()
    multiplier = torch.randn(B, HQ, SQ, SK, dtype=torch.float64)  # any sign
    sinks = torch.randn(B, HQ, SQ, dtype=torch.float64) if with_sinks else None
    inputs = [x.requires_grad_() for x in (q, k, v, multiplier, sinks) if x is not None]
    dropout = Dropout(p, torch.tensor([1, 2])) if p else None
    keep = dropout.tile((B, HQ), slice(0, SQ), slice(0, SK)) if p else None

    ours = attention(
        q,
        k,
        v,
        multiplier,
        Visibility.of(q, k, **arguments),
        terms=Terms(softcap=softcap, sinks=sinks),
        dropout=dropout,
    )
    theirs = textbook(q, k, v, multiplier, visible, softcap, sinks, keep, p)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-12)

    weights = torch.randn_like(theirs[0])
    row_weights = torch.where(visible.any(-1), torch.randn(3, B, HQ, SQ, dtype=torch.float64), 0)

    def gradients(out, *of_rows):
        finite = torch.where(visible.any(-1), torch.stack(of_rows), 0)
        loss = (out * weights).sum() + (finite * row_weights).sum()
        return torch.autograd.grad(loss, inputs, materialize_grads=True)

    torch.testing.assert_close(gradients(*ours), gradients(*theirs), rtol=1e-10, atol=1e-11)


@pytest.mark.filterwarnings("ignore:.torch.jit.script")  # of the first forward mode
@pytest.mark.parametrize("result", ["max_logit", "entropy"])
def test_statistics_of_rows_have_derivatives_of_every_order(result):
    q, k, v = tensors(q_len=3, k_len=4)
    visible = Visibility.of(q, k, causal=True)

    def of_rows(q, k):
        return getattr(attention(q, k, v, 0.7, visible, terms=Terms(softcap=2.0)), result)

    inputs = [x[:1, :2].clone().requires_grad_() for x in (q, k)]
    visible = Visibility.of(*inputs, causal=True)
    v = v[:1, :2]
    assert torch.autograd.gradcheck(of_rows, inputs, check_forward_ad=True)
    assert torch.autograd.gradgradcheck(of_rows, inputs)


def test_probabilities_are_rounded_to_the_dtype_of_v():
    q, k = torch.zeros(1, 1, 1, 4), torch.zeros(1, 1, 3, 4)
    v = torch.full((1, 1, 3, 1), 1.0, dtype=torch.bfloat16)
    third = torch.tensor(1 / 3).to(torch.bfloat16).float()
    out = attention(q, k, v, 1.0, Visibility.of(q, k)).out
    assert out.dtype == torch.float32
    assert out.item() == pytest.approx(3 * third.item(), rel=1e-6)


def test_far_apart_logits_and_sinks():
    q = torch.tensor([[[[1.0]]]])
    k = torch.tensor([[[[1e4], [-1e4], [1e4]]]])
    v = torch.tensor([[[[1.0], [2.0], [4.0]]]])
    result = attention(q, k, v, 1.0, Visibility.of(q, k))
    assert result.out.item() == 2.5
    assert result.lse.item() == pytest.approx(1e4 + math.log(2))
    assert result.entropy.item() == pytest.approx(math.log(2))
    sinks = torch.tensor([3e4], requires_grad=True)
    drained = attention(q, k, v, 1.0, Visibility.of(q, k), terms=Terms(sinks=sinks))
    assert drained.out.item() == 0
    assert drained.lse.item() == result.lse.item()
    assert torch.autograd.grad(drained.out.sum(), sinks)[0].item() == 0


@pytest.mark.parametrize("sink", [-16.0, -40.0])
def test_a_sink_far_below_lse_has_its_gradient(sink):
    """Its share of the softmax is lost in 1 - share, in fp32 from 17 on."""
    found = []
    for dtype in (torch.float32, torch.float64):
        q, k, v = torch.randn(3, 1, 1, 5, 8, generator=torch.Generator().manual_seed(0)).to(dtype)
        sinks = torch.tensor([sink], dtype=dtype, requires_grad=True)
        result = attention(q, k, v, 0.3, Visibility.of(q, k), terms=Terms(sinks=sinks))
        found.append(torch.autograd.grad(result.out.square().sum(), sinks)[0].double())
    torch.testing.assert_close(*found, rtol=1e-4, atol=0)
    assert found[1] != 0


@pytest.mark.parametrize("mode", SCALINGS)
def test_second_order_gradients_of_every_mode(mode):
    """The reference and the multipliers are plain torch: they can be differentiated to any order."""
    q, k, v = (x[:1, :2, :3].clone().requires_grad_() for x in tensors())
    visibility = Visibility.of(q, k, causal=True)

    def run(q, k, v):
        multiplier = SCALINGS[mode]().multiplier(q, k, visibility.dense())
        result = attention(q, k, v, multiplier, visibility, terms=Terms(softcap=5.0))
        return result.out, result.lse

    assert torch.autograd.gradcheck(run, (q, k, v), fast_mode=True)
    assert torch.autograd.gradgradcheck(run, (q, k, v), fast_mode=True)
