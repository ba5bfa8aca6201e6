"""The statistics of every row of a softmax by their definitions, dense and in float64."""

import torch
from torch.func import jacrev, vmap

from tests.support.learned import HEAD_DIM, HEADS
from tests.support.masks import visible_pairs
from tritonattn.calls.checks import check
from tritonattn.core.call import Request
from tritonattn.core.terms import Terms
from tritonattn.core.visibility import Visibility

B, HQ, D = 2, HEADS, HEAD_DIM


def tensors(q_len=6, k_len=9, kv_heads=2, seed=0, size=1.5, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    q = torch.randn(B, HQ, q_len, D, generator=generator, dtype=torch.float64) * size
    k = torch.randn(B, kv_heads, k_len, D, generator=generator, dtype=torch.float64) * size
    return q.to(dtype), k.to(dtype)


def dense(q, k, scaling="sqrt_dim", gain=None, **masks):
    """Every statistic of every row from its definition: a dict of [B, Hq, Sq]; 0 in rows without keys."""
    q, k = q.double(), k.double()
    sizes = (*q.shape[:3], k.shape[2])
    visible = visible_pairs(sizes, **masks)
    k = k.repeat_interleave(q.shape[1] // k.shape[1], dim=1)
    request = check(Request(q, k, k, Visibility.of(q, k), Terms(), scaling, gain))
    factor = request.scaling.multiplier(q, k, visible)
    factor = factor * (1.0 if gain is None else gain[..., None] if isinstance(gain, torch.Tensor) else gain)
    distance = (torch.arange(sizes[2])[:, None] + sizes[3] - sizes[2] - torch.arange(sizes[3]))[None, None]
    if (of_distance := request.scaling.relative_multiplier(q, k, distance)) is not None:
        factor = factor * of_distance
    bias = request.scaling.relative_addend(q, k, distance)
    bias = (torch.zeros(()) if bias is None else bias).double().expand(sizes).flatten(0, 2)
    factor = torch.where(visible, torch.as_tensor(factor, dtype=torch.float64).detach(), 0)
    attended, products = visible.flatten(0, 2), (q @ k.mT).flatten(0, 2)
    z = factor.flatten(0, 2) * products + bias

    def softmax(z, attended):
        return torch.where(attended, z, -torch.inf).softmax(-1)

    def norms(function, *operands):
        return vmap(jacrev(function))(*operands).flatten(1).norm(dim=1)

    p, n = softmax(z, attended), attended.sum(-1)

    def variance(x):
        mean = torch.where(attended, x, 0).sum(-1, keepdim=True) / n[:, None]
        return torch.where(attended, x - mean, 0).square().sum(-1) / n

    found = {
        "key_count": n.double(),
        "logit_std": variance(z).sqrt(),
        "max_logit": torch.where(attended, z, -torch.inf).amax(-1),
        "max_probability": p.amax(-1),
        "entropy": torch.special.entr(p).sum(-1),
        "output_variance": variance(p),
        "jacobian_norm": norms(softmax, z, attended),
        "gradient_norm": norms(
            lambda x, f, b, keys: softmax(f * x + b, keys), products, factor.flatten(0, 2), bias, attended
        ),
    }
    return {name: torch.where(n > 0, values, 0).view(sizes[:3]) for name, values in found.items()}
