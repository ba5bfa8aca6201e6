"""A bias of each key on the logits: the formula, -inf, a scaling that returns one."""

import pytest
import torch

import tritonattn
from tests.support.calls import operands
from tests.support.masks import MASKS, visible_pairs
from tests.support.pairs import pairwise
from tritonattn import Scales, Scaling, attention, check_scaling

BACKENDS = ("sdpa", "reference")
B, HQ, HKV, SQ, SK = 2, 4, 2, 5, 7


def bias_of(*shape: int, seed: int = 1) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def formula(q, k, v, bias, visible, softcap=None, sinks=None):
    """(out, lse, max_logit), from softmax(q . k / sqrt(D) + bias_j) written out; bias [B, Hq, Sk]."""
    k, v = (x.repeat_interleave(HQ // HKV, 1) for x in (k, v))
    logits = (q @ k.mT * q.shape[-1] ** -0.5 + bias[:, :, None]).masked_fill(~visible, -torch.inf)
    hidden = logits == -torch.inf
    capped = logits if softcap is None else softcap * torch.tanh(logits / softcap)
    capped = capped.masked_fill(hidden & ~hidden.all(-1, keepdim=True), -torch.inf)  # rows of hidden keys: anything
    capped = capped.masked_fill(hidden.all(-1, keepdim=True), 0)
    lse = capped.logsumexp(-1)
    total = lse if sinks is None else torch.logaddexp(lse, sinks[:, None])
    return (capped - total[..., None]).exp() @ v, lse, logits.amax(-1)


@pairwise(
    heads=[1, HKV, HQ],
    mask=["full", "causal", "window", "lengths", "mask of heads"],
    softcap=[None, 1.5],
    sinks=[None, torch.tensor([0.3, -1.0, 2.0, 0.0], dtype=torch.float64)],
    backend=BACKENDS,
)
def test_the_formula(heads, mask, softcap, sinks, backend):
    tensors = operands() | {"key_bias": bias_of(B, heads, SK)}
    tensors["key_bias"][:, :, 2] = -torch.inf
    leaves = {name: x.detach().requires_grad_() for name, x in tensors.items()}
    sizes = (B, HQ, SQ, SK)
    arguments = MASKS[mask](*sizes) | {"softcap": softcap, "sinks": sinks, "backend": backend}
    out, aux = attention(**leaves, **arguments, return_aux=True)
    visible = visible_pairs(sizes, **MASKS[mask](*sizes))
    whole = leaves["key_bias"].repeat_interleave(HQ // heads, 1)
    wanted = formula(leaves["q"], leaves["k"], leaves["v"], whole, visible, softcap, sinks)
    sees = (visible & (whole != -torch.inf)[:, :, None]).any(-1)
    for ours, theirs, otherwise in zip(
        (out, aux.lse, aux.max_logit), wanted, (0.0, -torch.inf, -torch.inf), strict=True
    ):
        rows = sees[..., None] if ours.dim() == 4 else sees
        torch.testing.assert_close(ours, torch.where(rows, theirs, otherwise))
    weights = torch.linspace(-1, 2, out.numel(), dtype=torch.float64).view_as(out)
    found = torch.autograd.grad((out * weights).sum() + aux.lse[sees].sum(), leaves.values())
    expected = torch.autograd.grad((wanted[0] * weights)[sees].sum() + wanted[1][sees].sum(), leaves.values())
    for name, ours, theirs in zip(leaves, found, expected, strict=True):
        torch.testing.assert_close(ours, theirs.nan_to_num(0), msg=name)


@pytest.mark.parametrize("backend", BACKENDS)
def test_minus_infinity_takes_a_key_all_weight(backend):
    """As a mask, but for what a scaling counts; a row of such keys is as one without keys."""
    tensors, mask = operands(), bias_of(B, HQ, 1, SK) > 0
    mask[0, 0] = False
    bias = torch.where(mask[:, :, 0], 0.0, -torch.inf)
    options = {"softcap": 2.0, "sinks": torch.zeros(HQ), "return_aux": True, "backend": backend}
    for ours, theirs in zip(
        *(
            (out, *aux, *torch.autograd.grad(out.square().sum(), tensors.values()))
            for out, aux in (
                attention(**tensors, **hidden, **options) for hidden in ({"key_bias": bias}, {"mask": mask})
            )
        ),
        strict=True,
    ):
        torch.testing.assert_close(ours, theirs)
    counted = attention(**tensors, scaling="key_count", key_bias=bias, backend=backend)
    torch.testing.assert_close(counted, attention(**tensors, scaling=1 / SK, mask=mask, backend=backend))


class Recent(Scaling):
    """logit = q . k / sqrt(D) + slope_h j + ||k||: a scaling with a bias of each key."""

    name = "recent"

    def slopes(self, k):
        return torch.arange(1, HQ + 1, dtype=k.dtype)[:, None] * torch.arange(k.shape[2], dtype=k.dtype)

    def scales(self, q, k, visibility, statistics):
        norms = statistics.norms.repeat_interleave(HQ // HKV, 1)
        return Scales(q.shape[-1] ** -0.5, key_bias=self.slopes(k) + norms)

    def multiplier(self, q, k, visible):
        return torch.tensor(q.shape[-1] ** -0.5)

    def addend(self, q, k, visible):
        return (self.slopes(k) + k.norm(dim=-1))[:, :, None]


class Wrong(Recent):
    def addend(self, q, k, visible):
        return super().addend(q, k, visible) * 1.01


def test_a_scaling_may_return_one():
    assert max(check_scaling(Recent()).values()) < 1e-6
    with pytest.raises(ValueError, match=r"mask 'full', .*addend\(\)"):
        check_scaling(Wrong())
    tensors, bias = operands(), bias_of(B, HKV, SK)
    scaling = tritonattn.nn.PerHead(Recent(), heads=HQ)
    ours, theirs = (attention(**tensors, scaling=scaling, key_bias=bias, backend=backend) for backend in BACKENDS)
    torch.testing.assert_close(ours, theirs)
    assert not torch.allclose(ours, attention(**tensors, scaling=scaling))
    with pytest.raises(ValueError, match="mode_b: expected modes without a bias"):
        attention(**tensors, scaling=tritonattn.nn.Scheduled("sqrt_dim", Recent(), steps=3))
