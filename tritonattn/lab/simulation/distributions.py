"""Distributions of random keys."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

_CLIPPED = 3e4  # within fp16's range


def of_equal_norm(k: Tensor) -> Tensor:
    """Scale keys to norm sqrt(D), the average of Gaussian ones."""
    return k / k.norm(dim=-1, keepdim=True) * math.sqrt(k.shape[-1])


def of_log_normal_norm(k: Tensor, random: torch.Generator) -> Tensor:
    """Scale keys to norms sqrt(D) exp(x), x standard normal for each key."""
    return of_equal_norm(k) * torch.randn(k.shape[:-1], generator=random, dtype=k.dtype).exp()[..., None]


def _heavy_tailed(k: Tensor, random: torch.Generator) -> Tensor:
    """Make components follow Student's t with one degree of freedom, a ratio of normal numbers; clipped."""
    return (k / torch.randn(k.shape, generator=random, dtype=k.dtype)).clamp(-_CLIPPED, _CLIPPED)


def _few_giants(k: Tensor, random: torch.Generator) -> Tensor:
    """Make the first key and one in 64 a thousand times larger than the rest."""
    giant = torch.rand(k.shape[:-1], generator=random) < 1 / 64
    giant[..., 0] = True
    return torch.where(giant[..., None], 1000 * k, k)


def _half_zeros(k: Tensor, random: torch.Generator) -> Tensor:
    return k * (torch.rand(k.shape[:-1], generator=random) < 0.5)[..., None]


# From keys k [..., D] with standard normal components, fp64 on the CPU.
DISTRIBUTIONS: dict[str, Callable[[Tensor, torch.Generator], Tensor]] = {
    "gaussian": lambda k, random: k,
    "unit sphere": lambda k, random: of_equal_norm(k),
    "log-normal": of_log_normal_norm,
    "heavy-tailed": _heavy_tailed,
    "few giants": _few_giants,
    "half zeros": _half_zeros,
    "very large": lambda k, random: 1e3 * k,
    "very small": lambda k, random: 1e-3 * k,
}
