"""8 bits with a 16-bit result that say what it was before it was rounded.

They are 256ths of the result's last place: the difference of two fp32 numbers' bits, since the bits of numbers of one
sign grow as the numbers do. So no exponent is taken apart, and an exact result has 0. Restored numbers are off by at
most 1/256 of the last place (1/512 but for the upper end of the 8 bits), and never further off than the rounded ones:
those of fp16 below 2^-14, whose last place is wider than fp32's is fine, keep what fits. NaN stays NaN.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


def lost_in_rounding(exact: Tensor, rounded: Tensor) -> Tensor:
    """Return what exact, in fp32, lost when it became `rounded`, in bf16 or fp16, as int8."""
    shift = _shift(rounded.dtype)
    lost = exact.view(torch.int32) - rounded.float().view(torch.int32)
    return ((lost + (1 << (shift - 1))) >> shift).clamp_(-128, 127).to(torch.int8)


def before_rounding(rounded: Tensor, lost: Tensor) -> Tensor:
    """Return in fp32 what `rounded`, in bf16 or fp16, was, from what it lost."""
    bits = rounded.float().view(torch.int32) + (lost.int() << _shift(rounded.dtype))
    return bits.view(torch.float32)


def _shift(dtype: torch.dtype) -> int:
    """Bits of fp32's mantissa below the eight that are kept: 23, less the dtype's bits, less 8."""
    return 15 + round(math.log2(torch.finfo(dtype).eps))
