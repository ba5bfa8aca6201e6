"""Factors of distances: the mode scale_invariant, a mode of a user, and a table that is given."""

from __future__ import annotations

import math
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor
from torch.autograd import gradcheck

import tritonattn
from tests.support.calls import operands
from tests.support.masks import MASKS, visible_pairs
from tests.support.packed import Packed, packed_operands
from tests.support.pairs import in_turn, pairwise
from tests.support.refusals import refuses
from tritonattn import Scales, Scaling, attention, nn, scaled_attention
from tritonattn.core.statistics import Statistics
from tritonattn.core.visibility import Visibility
from tritonattn.scaling import ScaleInvariant

BACKENDS = ("sdpa", "reference")
SIZES = B, HQ, SQ, SK = 2, 4, 5, 7


def table(*shape: int, seed: int = 0) -> Tensor:
    """Factors of either sign."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).requires_grad_()


def dense(q: Tensor, k: Tensor, v: Tensor, factor: Tensor, bias: Tensor, visible: Tensor) -> Tensor:
    """softmax(q . k * factor + bias) v over the visible pairs; zeros in rows without keys."""
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
    logit = (q @ k.mT * factor + bias).masked_fill(~visible, -torch.inf)
    return torch.softmax(logit, -1).nan_to_num() @ v


def distances(rows: int, keys: int) -> Tensor:
    return torch.arange(rows)[:, None] + keys - rows - torch.arange(keys)


def of_paper(t: Tensor, tau: float, head_dim: int) -> tuple[Tensor, Tensor]:
    """a_t / sqrt(D) and m_t of arXiv:2505.17083."""
    logarithm = torch.log(t.abs().double() / tau + 1)
    return torch.sqrt(2 * logarithm + 1) / math.sqrt(head_dim), -2 * logarithm


@in_turn(mask=MASKS, backend=BACKENDS, lengths=[(5, 7), (7, 7), (7, 5)], tau=[10.0, 0.5])
def test_scale_invariant_attention_is_that_of_its_paper(mask, backend, lengths, tau):
    tensors, masks = operands(lengths=lengths), MASKS[mask](B, HQ, *lengths)
    visible = visible_pairs((B, HQ, *lengths), **masks)
    ours = attention(**tensors, scaling=ScaleInvariant(tau), backend=backend, **masks)
    wanted = dense(*tensors.values(), *of_paper(distances(*lengths), tau, 8), visible)
    torch.testing.assert_close(ours, wanted, rtol=1e-6, atol=1e-6)  # tables are of fp32
    gradients = (torch.autograd.grad(x.square().sum(), tensors.values()) for x in (ours, wanted))
    for found, exact in zip(*gradients, strict=True):
        torch.testing.assert_close(found, exact, rtol=1e-5, atol=1e-6)


def test_weight_and_sparsity_are_of_one_scale():
    """Normal logits: E[exp(z)] = exp(m + a^2 / 2) falls like 1 / t, and E[z exp(z)] / E[exp(z)] = m + a^2 stays."""
    q, k = torch.ones(1, 1, 1, 1), torch.ones(1, 1, 1000, 1)
    scales = ScaleInvariant().scales(q, k, Visibility.of(q, k), Statistics(k, Visibility.of(q, k)))
    a, m, t = scales.relative[0, 0, 0].double(), scales.relative_bias[0, 0, 0].double(), torch.arange(1000).double()
    torch.testing.assert_close(torch.exp(m + a**2 / 2), math.exp(0.5) / (1 + t / 10), rtol=1e-5, atol=0)
    torch.testing.assert_close(m + a**2, torch.ones_like(t), rtol=0, atol=1e-5)


@dataclass(frozen=True)
class Near(Scaling):
    """logit = q . k / sqrt(D) (1 + exp(-t) ||q||), for t from -1 to 2, with a bias of 1 / (1 + abs(t)) there."""

    name = "near"

    def scales(self, q, k, visibility, statistics):
        t = torch.arange(-1, 3, dtype=q.dtype, device=q.device)
        factors = 1 + torch.exp(-t) * statistics.query_norms(q)[..., None]  # [B, Hq, Sq, 4]
        bias = (1 / (1 + t.abs()))[None, None, None]
        return Scales(q.shape[-1] ** -0.5, relative=factors, relative_bias=bias, relative_right=1)

    def multiplier(self, q, k, visible):
        return torch.tensor(q.shape[-1] ** -0.5)

    def relative_multiplier(self, q, k, distance):
        return torch.where(_is_near(distance), 1 + torch.exp(-distance.to(q)) * q.norm(dim=-1, keepdim=True), 1)

    def relative_addend(self, q, k, distance):
        return torch.where(_is_near(distance), 1 / (1 + distance.to(q).abs()), 0)


def _is_near(distance):
    return (distance >= -1) & (distance < 3)


class Wrong(Near):
    def relative_multiplier(self, q, k, distance):
        return super().relative_multiplier(q, k, distance + 1)


@pytest.mark.parametrize("right", [0, 4])
def test_a_mode_of_a_user_beside_a_bias_of_another_extent(right):
    assert max(tritonattn.check_scaling(Near()).values()) < 1e-6
    refuses("ValueError: scaling: under the mask 'full', ~ multiplier()", tritonattn.check_scaling, Wrong())
    tensors, bias, scaling = operands(), table(B, 1, SQ, 9), nn.PerHead(Near(), heads=HQ, dtype=torch.float64)
    options = {"scaling": scaling, "relative_bias": bias, "relative_right": right}
    ours, theirs = (attention(**tensors, **options, backend=one) for one in BACKENDS)
    torch.testing.assert_close(ours, theirs)
    leaves = [*tensors.values(), bias, scaling.theta]
    for x, y in zip(*(torch.autograd.grad(out.square().sum(), leaves) for out in (ours, theirs)), strict=True):
        torch.testing.assert_close(x, y)


@pairwise(
    mask=["causal", "window", "ranges", "mask of heads"],
    shape=[(1, 1, 1, 3), (1, HQ, 1, 9), (B, HQ, SQ, 4), (B, 1, SQ, 1)],
    more=[{}, {"softcap": 2.0}, {"softcap": 2.0, "bias_after_softcap": True}, {"dropout_p": 0.3}],
)
def test_gradients_of_a_table(mask, shape, more):
    masks, bias = MASKS[mask](*SIZES), table(1, HQ, 1, shape[3], seed=1)
    right = {"relative_right": min(1, shape[3] - 1)}

    def call(q, k, v, factors, bias):
        torch.manual_seed(0)
        return scaled_attention(q, k, v, relative_scale=factors, relative_bias=bias, **right, **masks, **more)

    assert gradcheck(call, (*operands().values(), table(*shape), bias), fast_mode=True)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("mask", ["causal", "window"])
def test_what_a_table_holds_for_hidden_pairs_reaches_nothing(mask, backend):
    tensors, found = operands(), []
    for hidden in (1.0, torch.nan):
        factors = table(1, HQ, 1, SK + 4).detach()
        factors[..., : 4 if mask == "causal" else 1] = hidden  # of keys behind the row, or behind the window
        out = scaled_attention(
            **tensors, relative_scale=factors, relative_right=4, backend=backend, **MASKS[mask](*SIZES)
        )
        found.append([out, *torch.autograd.grad(out.square().sum(), tensors.values())])
    for one, other in zip(*found, strict=True):
        assert torch.equal(one, other)


def test_packed_sequences_and_caches_count_from_their_own_ends():
    packed = Packed((4, 1), (4, 3))
    q, k, v = packed_operands(packed).values()
    out = tritonattn.attention_varlen(q, k, v, **packed.arguments(), scaling=Near(), causal=True)
    first = attention(*(x[:4].transpose(0, 1)[None] for x in (q, k, v)), scaling=Near(), causal=True)
    torch.testing.assert_close(out[:4].transpose(0, 1)[None], first)
    second = attention(q[4:5].transpose(0, 1)[None], *(x[4:7].transpose(0, 1)[None] for x in (k, v)), scaling=Near())
    torch.testing.assert_close(out[4:5].transpose(0, 1)[None], second)

    q, k, v = (x.detach() for x in operands(lengths=(2, SK)).values())
    lengths = torch.tensor([SK, 4])
    for invariant in (False, True):
        options = {"scaling": Near(), "batch_invariant": invariant}
        steps = tritonattn.attention_decode(q, k, v, key_lengths=lengths, **options)
        alone = attention(q[1:], k[1:, :, :4], v[1:, :, :4], causal=True, scaling=Near())
        torch.testing.assert_close(steps[1:], alone)


def test_errors():
    tensors, given = operands(), {"relative_scale": table(1, 1, 1, 3)}
    refuses("ValueError: tau: expected a finite number above 0, got 0", ScaleInvariant, 0)
    wrong = {"relative_right": 3}
    refuses(
        "ValueError: relative_right: expected less than the extent, 3, got 3",
        scaled_attention,
        **tensors,
        **given,
        **wrong,
    )
    mixed = nn.Scheduled("sqrt_dim", Near(), steps=3)
    for backend in BACKENDS:
        message = "ValueError: mode_b: expected a mode without a factor of distances, got Near()"
        refuses(message, attention, **tensors, scaling=mixed, backend=backend)
