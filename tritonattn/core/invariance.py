"""The switch for bits of a row that do not depend on the rest of the batch, and a sum in one order."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from threading import local

import torch
from torch import Tensor


class _Switch(local):
    """The switch of a thread; torch.compile cannot read a ContextVar."""

    is_on = False


switch = _Switch()


@contextmanager
def batch_invariant(enabled: bool = True) -> Iterator[None]:
    """Turn `batch_invariant` on, or off, for calls inside that leave the argument at None, in this thread.

    The bits of a row then do not depend on the rest of the batch, on padding and packing, on prefill or decode
    (docs/batch-invariance.md). A call that cannot promise that raises NotImplementedError.
    A function under torch.compile keeps the switch of its first call: give it the argument itself.

    >>> import torch, tritonattn
    >>> q, k, v = torch.randn(3, 2, 4, 16, 8)
    >>> with tritonattn.batch_invariant():
    ...     out = tritonattn.attention(q, k, v, causal=True)
    ...     alone = tritonattn.attention(q[:1, :, :5], k[:1, :, :5], v[:1, :, :5], causal=True)
    >>> torch.equal(out[:1, :, :5], alone)
    True
    """
    if not isinstance(enabled, bool):
        raise TypeError(f"enabled: expected a bool, got {type(enabled).__name__} {enabled!r}")
    before, switch.is_on = switch.is_on, enabled
    try:
        yield
    finally:
        switch.is_on = before


def is_invariant(asked: bool | None) -> bool:
    """The switch of a call: its argument, or that of the context where it has none."""
    return switch.is_on if asked is None else asked


def refuse_over_ranks(asked: bool | None) -> None:
    """Raise where the switch is on for a sequence that ranks share, whose parts are joined by their number."""
    if is_invariant(asked):
        raise NotImplementedError("batch_invariant: not supported for a sequence split over ranks")


def power(x: Tensor, exponent: Tensor | float) -> Tensor:
    """x^exponent of x >= 0 by exp and log: torch.pow on a CPU rounds otherwise in the remainder of a vector."""
    return (x.log() * exponent).exp()


def halving_sum(x: Tensor) -> Tensor:
    """Sum of x [..., n] over the last axis, [..., 1], by adding halves: the order of a row depends on n alone.

    torch.sum takes another order for other sizes and strides of the other axes.
    """
    width = x.shape[-1]
    whole = 1 << max(width - 1, 0).bit_length()
    x = torch.nn.functional.pad(x, (0, whole - width))
    while x.shape[-1] > 1:
        half = x.shape[-1] // 2
        x = x[..., :half] + x[..., half:]
    return x
