"""8-bit caches: descales of each kind, what they quantise, and what the 8 bits stand for."""

import torch
from torch import Tensor

from tests.support.pages import PagedBatch
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


def in_pages(batch: PagedBatch, *descales: float | Tensor | None) -> tuple[dict, Tensor, Tensor]:
    """The arguments of `attention_varlen` over 8-bit pages of a batch's k and v, and the packed k and v of those."""
    arguments, held = batch.arguments(), []
    for name, x, descale in zip("kv", (batch.k, batch.v), descales, strict=True):
        new, wide = quantised(x, along(descale, batch.key_lengths))
        pages = arguments[name].to(EIGHT_BIT)
        for numbers, (_, own) in zip(batch.table, batch.packed.sequences(), strict=True):
            j = torch.arange(own.stop - own.start)
            pages[numbers[j // batch.page].long(), j % batch.page] = new[own]
        arguments |= {name: pages, f"{name}_descale": descale}
        held.append(wide)
    return arguments, *held
