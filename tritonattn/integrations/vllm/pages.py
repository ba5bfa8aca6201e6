"""The cells of vLLM's cache: a key and its value, and behind them what a layer records of keys.

A record in vLLM's blocks is counted, copied and freed as they are.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ...calls.paged_statistics import PagedKeyStatistics
from ...core.eight_bit import EIGHT_BIT, Descale

RECORD = 16  # numbers of a cell for two of 8 bytes and two of 4; keys of 16 bits stay at multiples of 32 bytes
_RECORD_BYTES = 32  # at least
_NULL_BLOCK = 0  # no sequence has it
_LARGEST = torch.finfo(EIGHT_BIT).max


def cell_bytes(widths: int, itemsize: int) -> int:
    """Bytes of a cell with a record, behind a key and a value of so many numbers."""
    return widths * itemsize + max(RECORD * itemsize, _RECORD_BYTES)


def descale_of(scale: Tensor, number: float) -> Descale:
    """The factor of 8-bit keys or values: vLLM's scale of them, one in all, on the host too, or one a head."""
    return number if scale.numel() == 1 else scale.view(1, -1)


def quantised(new: Tensor, descale: Descale) -> Tensor:
    """New keys or values [tokens, Hkv, D] in 8 bits; the largest stands for what is larger."""
    wide = new.float() / (descale[..., None] if isinstance(descale, Tensor) else descale)
    return wide.clamp(-_LARGEST, _LARGEST).to(EIGHT_BIT)


def keys_and_values(cache: Tensor, head_size: int) -> tuple[Tensor, Tensor]:
    """Split [blocks, Hkv, block, 2 D or 2 D + RECORD], of any strides, into keys and values [blocks, block, Hkv, D]."""
    cells = cache.transpose(1, 2)
    return cells[..., :head_size], cells[..., head_size : 2 * head_size]


def key_statistics(cache: Tensor, head_size: int) -> PagedKeyStatistics:
    """The record of key norms in a cache [blocks, Hkv, block, 2 D + RECORD]."""
    behind = cache.transpose(1, 2)[..., 2 * head_size :]
    wide, narrow = behind.view(torch.float64), behind.view(torch.float32)
    return PagedKeyStatistics.inside((narrow[..., 4], wide[..., 0], wide[..., 1], narrow[..., 5]), _NULL_BLOCK)
