"""Rotary positions."""

from __future__ import annotations

import torch
from torch import Tensor


def rotated(x: Tensor, positions: Tensor, base: float) -> Tensor:
    """x with its pairs (x[d], x[d + D / 2]) turned by the angle position * base^(-2 d / D), in fp32 at least.

    Products of q and k then depend on distances alone, and norms stay. Su et al. 2021, arXiv:2104.09864; the pairs are
    those of Llama's and of transformers' models.

    x           [B, H, S, D], D even
    positions   [B or 1, S]
    """
    half, exact = x.shape[-1] // 2, torch.promote_types(x.dtype, torch.float32)
    frequencies = base ** (-torch.arange(half, device=x.device, dtype=exact) / half)
    angles = positions[:, None, :, None] * frequencies  # [B or 1, 1, S, D / 2]
    cos, sin = angles.cos(), angles.sin()
    a, b = x.to(exact).chunk(2, dim=-1)
    return torch.cat([a * cos - b * sin, a * sin + b * cos], dim=-1).to(x.dtype)
