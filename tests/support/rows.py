"""The statistics of every row of a softmax by their definitions, dense and in float64."""

import torch

from tests.support.learned import HEAD_DIM, HEADS
from tests.support.masks import visible_pairs
from tritonattn.calls.factor import Factor

B, HQ, D = 2, HEADS, HEAD_DIM


def tensors(q_len=6, k_len=9, kv_heads=2, seed=0, size=1.5, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    q = torch.randn(B, HQ, q_len, D, generator=generator, dtype=torch.float64) * size
    k = torch.randn(B, kv_heads, k_len, D, generator=generator, dtype=torch.float64) * size
    return q.to(dtype), k.to(dtype)


def dense(q, k, scaling="sqrt_dim", gain=None, **masks):
    """Every statistic of every row from its definition: a dict of [B, Hq, Sq]."""
    q, k = q.double(), k.double()
    sizes = (*q.shape[:3], k.shape[2])
    visible = visible_pairs(sizes, **masks)
    k = k.repeat_interleave(q.shape[1] // k.shape[1], dim=1)
    factor = Factor.of(scaling, gain, q, tuple(q.shape[:3]), "[B, Hq, Sq]")
    full = factor.scaling.multiplier(q, k, visible)
    full = full * (1.0 if gain is None else gain[..., None] if isinstance(gain, torch.Tensor) else gain)
    full = torch.as_tensor(full, dtype=torch.float64).detach().expand(sizes)
    products = q @ k.mT
    found: dict[str, list] = {}
    for index in torch.cartesian_prod(*(torch.arange(size) for size in sizes[:3])).tolist():
        seen = visible[tuple(index)]
        row = _row(products[tuple(index)][seen], full[tuple(index)][seen])
        for name, value in row.items():
            found.setdefault(name, []).append(float(value))
    return {name: torch.tensor(values, dtype=torch.float64).view(sizes[:3]) for name, values in found.items()}


def _row(x, f):
    names = ("key_count", "logit_std", "max_logit", "max_probability", "entropy", "output_variance")
    if len(x) == 0:
        return dict.fromkeys((*names, "jacobian_norm", "gradient_norm"), 0.0)
    z = f * x
    p = torch.softmax(z, -1)
    jacobian = torch.autograd.functional.jacobian(lambda z: torch.softmax(z, -1), z)
    reaching = torch.autograd.functional.jacobian(lambda x: torch.softmax(f * x, -1), x)
    values = (len(x), z.std(correction=0), z.max(), p.max(), torch.special.entr(p).sum(), p.var(correction=0))
    return {**dict(zip(names, values, strict=True)), "jacobian_norm": jacobian.norm(), "gradient_norm": reaching.norm()}
