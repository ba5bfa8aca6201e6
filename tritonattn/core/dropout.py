"""Dropout whose keep bit is a function of the position: the same mask on every backend, in every tile, in backward.

With f the first key of row i's sequence, 0 where nothing is packed, the bit of (b, h, i, j) is word (j - f) % 4 of
Philox4x32-10 (Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3") with key = seed and counter =
(j - (j - f) % 4, i, b * Hq + h, offset), compared with p * 2^32: a call gives the bits of four neighbouring keys.
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

    def keep(
        self, batch: Tensor | int, head: Tensor, row: Tensor, key: Tensor, first: Tensor | int, q_heads: int
    ) -> Tensor:
        """The keep bits at int64 positions that broadcast together: bool. first: the first key of a row's sequence."""
        word = (key - first) % 4
        w0, w1, w2, w3 = self._words(batch, head, row, key - word, q_heads)
        drawn = torch.where(word < 2, torch.where(word == 0, w0, w1), torch.where(word == 2, w2, w3))
        return drawn >= self.threshold

    def keep_run(self, kept: Tensor, batch: int, head: Tensor, row: Tensor, first: int, q_heads: int) -> None:
        """Write the keep bits of consecutive keys into kept, bool [H, R, keys].

        head and row are [H, 1] and [R]; first, of these keys, is a multiple of 4 behind the first of their sequence.
        """
        group = torch.arange(first, first + kept.shape[2], 4, device=row.device)
        words = self._words(batch, head[..., None], row[:, None], group, q_heads)
        for number, word in enumerate(words):
            of_word = kept[..., number::4]
            torch.ge(word[..., : of_word.shape[2]], self.threshold, out=of_word)

    @property
    def threshold(self) -> int:
        """The Philox word from which on a probability is kept: p * 2^32."""
        return int(self.p * 2**32)

    def tile(self, shape: tuple[int, int], rows: slice, keys: slice, first: Tensor | int = 0) -> Tensor:
        """The keep bits of some rows and keys for shape = (B, Hq): bool [B, Hq, rows, keys].

        first   the first key of each row's sequence, int64 [rows], or of all
        """
        device = self.state.device
        batch = torch.arange(shape[0], device=device)[:, None, None, None]
        head = torch.arange(shape[1], device=device)[:, None, None]
        row = torch.arange(rows.start, rows.stop, device=device)[:, None]
        key = torch.arange(keys.start, keys.stop, device=device)
        if isinstance(first, Tensor):
            first = first[:, None]
        return self.keep(batch, head, row, key, first, shape[1])

    def _words(self, batch: Tensor | int, head: Tensor, row: Tensor, group: Tensor, q_heads: int) -> tuple[Tensor, ...]:
        """The four words, below 2^32, of each group of keys, of which `group` is the first."""
        seed, offset = self.state[0], self.state[1]
        return _philox((group, row, batch * q_heads + head, offset), (seed, seed >> 32))


def _philox(counter: tuple[Tensor, ...], key: tuple[Tensor, Tensor]) -> tuple[Tensor, ...]:
    """The four words of Philox4x32-10, in int64; of the counter's last two words and of the key only low halves count.

    A word that depends on few axes, as all do in the first rounds, is computed on these alone. Before it is multiplied
    a word is cut to 32 bits; c1 and c3, the low halves of products, stay products until then.
    """
    c0, c1, c2, c3 = counter
    rounds = torch.arange(_ROUNDS, device=key[0].device)
    keys = [half + rounds * step for half, step in zip(key, _KEY_STEPS, strict=True)]
    for k0, k1 in zip(*keys, strict=True):
        product0, product1 = c0 * _MULTIPLIERS[0], c2 * _MULTIPLIERS[1]  # they wrap around int64, their bits stay
        c0, c1, c2, c3 = _mixed(product1 >> 32, c1, k0), product1, _mixed(product0 >> 32, c3, k1), product0
    return c0, c1 & _WORD, c2, c3 & _WORD


def _mixed(high: Tensor, word: Tensor, key: Tensor) -> Tensor:
    """The low 32 bits of high ^ word ^ key, in the memory of `high` where it has the shape."""
    mixed = high.bitwise_xor_(word) if high.shape == word.shape else high ^ word
    return mixed.bitwise_xor_(key).bitwise_and_(_WORD)
