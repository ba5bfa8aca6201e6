"""Dropout whose keep bit is a function of the position: the same mask on every backend, in every tile, in backward.

The bit of (b, h, i, j) is the first word of Philox4x32-10 (Salmon et al. 2011, "Parallel random numbers: as easy as
1, 2, 3") with key = seed and counter = (j, i, b * Hq + h, offset), compared with p * 2^32.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass

import torch
from torch import Tensor

_WORD = 0xFFFFFFFF
_ROUNDS = 10
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_KEY_STEPS = (0x9E3779B9, 0xBB67AE85)
_stream: ContextVar[int] = ContextVar("tritonattn_dropout_stream", default=0)


@contextmanager
def stream(number: int) -> Iterator[None]:
    """Make the masks drawn inside independent of those of other numbers, at the same state of torch's generator."""
    token = _stream.set(number)
    try:
        yield
    finally:
        _stream.reset(token)


@dataclass(frozen=True, eq=False)
class Dropout:
    """Drop a probability with chance p, multiply the kept ones by 1 / (1 - p).

    state is int64 [2] on the device of the call: (seed, offset). The low 64 bits of the seed are the Philox key.
    """

    p: float
    state: Tensor

    @classmethod
    def draw(cls, p: float, device: torch.device) -> Dropout:
        """A new state from torch's generator of the device: repeatable under torch.manual_seed, no sync."""
        state = torch.randint(0, 2**31 - 1, (2,), dtype=torch.int64, device=device)
        if not torch.compiler.is_compiling() and (number := _stream.get()):
            state[0] += number << 32  # the upper word of the key, 0 otherwise
        return cls(p, state)

    def keep(self, batch: Tensor, head: Tensor, row: Tensor, key: Tensor, q_heads: int) -> Tensor:
        """The keep bits at int64 positions that broadcast together: bool."""
        seed, offset = self.state[0], self.state[1]
        counter = [key, row, batch * q_heads + head, offset & _WORD]
        return _philox(counter, [seed & _WORD, (seed >> 32) & _WORD]) >= self.threshold

    @property
    def threshold(self) -> int:
        """The Philox word from which on a probability is kept: p * 2^32."""
        return int(self.p * 2**32)

    def tile(self, shape: tuple[int, int], rows: slice, keys: slice) -> Tensor:
        """The keep bits of some rows and keys for shape = (B, Hq): bool [B, Hq, rows, keys]."""
        device = self.state.device
        batch = torch.arange(shape[0], device=device)[:, None, None, None]
        head = torch.arange(shape[1], device=device)[:, None, None]
        row = torch.arange(rows.start, rows.stop, device=device)[:, None]
        key = torch.arange(keys.start, keys.stop, device=device)
        return self.keep(batch, head, row, key, shape[1])


def _philox(counter: list[Tensor], key: list[Tensor]) -> Tensor:
    """First output word of Philox4x32-10, computed in int64.

    A word that depends on few axes, as all do in the first rounds, is computed on these alone.
    """
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(_ROUNDS - 1):
        (high0, low0), (high1, low1) = _multiply(c0, _MULTIPLIERS[0]), _multiply(c2, _MULTIPLIERS[1])
        c0, c1, c2, c3 = _mixed(high1, c1, k0), low1, _mixed(high0, c3, k1), low0
        k0, k1 = (k0 + _KEY_STEPS[0]) & _WORD, (k1 + _KEY_STEPS[1]) & _WORD
    return _mixed(_multiply(c2, _MULTIPLIERS[1])[0], c1, k0)


def _multiply(x: Tensor, factor: int) -> tuple[Tensor, Tensor]:
    """High and low 32-bit words of x * factor, both below 2^32: a product wraps around int64, its bits stay."""
    product = x * factor
    return (product >> 32).bitwise_and_(_WORD), product.bitwise_and_(_WORD)


def _mixed(new: Tensor, word: Tensor, key: Tensor) -> Tensor:
    """new ^ word ^ key, in the memory of `new` where it has the shape."""
    if torch.broadcast_shapes(new.shape, word.shape) == new.shape:
        return new.bitwise_xor_(word).bitwise_xor_(key)
    return (new ^ word).bitwise_xor_(key)
