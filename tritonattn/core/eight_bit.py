"""Keys and values of 8 bits, and the factors that they are stored without: their descales.

A descale is a float, or fp32 (fp64 for fp64 q) with the axes [B, Hkv], each of full size or 1; B is the number of
sequences where they are packed.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .visibility import Visibility

EIGHT_BIT = torch.float8_e4m3fn
Descale = float | Tensor


def dtype_of_sums(q: Tensor, v: Tensor) -> torch.dtype:
    """The dtype of a backend's output: v's, and for values of 8 bits one that holds their descaled sums."""
    return torch.promote_types(q.dtype, torch.float32) if v.dtype == EIGHT_BIT else v.dtype


def of_rows(descale: Descale, visible: Visibility) -> Descale:
    """The descale of what each row attends to: a float, or broadcastable to [B, Hq, Sq]."""
    if not isinstance(descale, Tensor):
        return descale
    sequences = visible.sequences
    if sequences is None or descale.shape[0] == 1:
        found = descale[:, :, None]
    else:
        found = _of(descale, sequences.sequence_of_rows(visible.q_len))
    return visible.repeated(found) if found.shape[1] > 1 else found


def of_keys(descale: Descale, visible: Visibility) -> Descale:
    """The descale of each key: a float, or broadcastable to [B, Hkv, Sk]."""
    if not isinstance(descale, Tensor):
        return descale
    sequences = visible.sequences
    if sequences is None or descale.shape[0] == 1:
        return descale[:, :, None]
    key = torch.arange(visible.k_len, device=descale.device)
    return _of(descale, sequences.position_of_keys(key)[0])


def _of(descale: Tensor, sequence: Tensor) -> Tensor:
    """[1, Hkv or 1, n] of the sequence of each of n rows or keys, N for none."""
    return descale[sequence.clamp(max=descale.shape[0] - 1)].mT[None]


def times(x: Tensor, descale: Descale | None) -> Tensor:
    """x [B, H, S, D] times what `of_rows` or `of_keys` gave."""
    if descale is None:
        return x
    return x * (descale[..., None] if isinstance(descale, Tensor) else descale)
