"""8-bit caches: descales of each kind, what they quantise, and what the 8 bits stand for."""

import torch
from torch import Tensor

from tritonattn.core.eight_bit import EIGHT_BIT

LARGEST = torch.finfo(EIGHT_BIT).max


def descale_of(kind: str, batch: int, kv_heads: int, seed: int = 0, device="cpu") -> float | Tensor | None:
    """One a tensor as a number or a tensor, one a head, one a sequence and head, or None."""
    shapes = {"tensor": (), "head": (kv_heads,), "sequence": (batch, kv_heads)}
    if kind in ("none", "number"):
        return None if kind == "none" else 0.037
    return (torch.rand(shapes[kind], generator=torch.Generator().manual_seed(seed)) * 0.05 + 0.02).to(device)


def along(descale: float | Tensor | None, counts: Tensor | None = None) -> float | Tensor:
    """The factor of keys [B, Hkv, S, D], or of packed ones [T, Hkv, D], of which sequences have `counts`."""
    if not isinstance(descale, Tensor):
        return 1.0 if descale is None else descale
    if counts is None:
        return descale.double()[..., None, None] if descale.dim() else descale.double()
    of_keys = descale.repeat_interleave(counts, 0) if descale.dim() == 2 else descale
    return of_keys.double()[..., None] if descale.dim() else descale.double()


def quantised(x: Tensor, factor: float | Tensor) -> tuple[Tensor, Tensor]:
    """x / factor in 8 bits, and in float64 what they stand for."""
    found = (x / factor).clamp(-LARGEST, LARGEST).to(EIGHT_BIT)
    return found, found.double() * factor
