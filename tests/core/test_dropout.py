"""The keep bits: Philox as published, a function of the position alone, and of the right rate."""

import pytest
import torch

from tritonattn.core.dropout import Dropout

# Random123's known answers for philox4x32-10 (kat_vectors): counter, key, first word of the result.
KNOWN_ANSWERS = [
    ((0, 0, 0, 0), (0, 0), 0x6627E8D5),
    ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, 0x408F276D),
    ((0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344), (0xA4093822, 0x299F31D0), 0xD16CFE09),
]


def philox(counter, key):
    """First word of Philox4x32-10 on Python integers, after Salmon et al. 2011, section 3.3."""
    mask = 2**32 - 1
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(10):
        high0, low0 = divmod(0xD2511F53 * c0, 2**32)
        high1, low1 = divmod(0xCD9E8D57 * c2, 2**32)
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0, k1 = (k0 + 0x9E3779B9) & mask, (k1 + 0xBB67AE85) & mask
    return c0


def state(seed, offset):
    signed = seed - 2**64 if seed >= 2**63 else seed
    return torch.tensor([signed, offset], dtype=torch.int64)


@pytest.mark.parametrize(("counter", "key", "word"), KNOWN_ANSWERS)
def test_known_answers(counter, key, word):
    """The word, read through the keep bit: kept at p = word / 2^32, dropped one step above."""
    assert philox(counter, key) == word
    seed = key[0] | key[1] << 32
    key_index, row, head, offset = counter
    position = [torch.tensor(x) for x in (0, head, row, key_index)]
    for step, kept in ((0, True), (1, False)):
        dropout = Dropout((word + step) / 2**32, state(seed, offset))
        assert dropout.keep(*position, q_heads=1).item() is kept


def test_bits_are_philox_of_the_position():
    seed, offset, p, (batch, heads, rows, keys) = 0x1234_5678_9ABC_DEF0, 77, 0.3, (2, 3, 4, 5)
    tile = Dropout(p, state(seed, offset)).tile((batch, heads), slice(0, rows), slice(0, keys))
    threshold = int(p * 2**32)
    for b, h, i, j in torch.cartesian_prod(*(torch.arange(n) for n in tile.shape)).tolist():
        word = philox((j, i, b * heads + h, offset), (seed & 0xFFFFFFFF, seed >> 32))
        assert tile[b, h, i, j].item() == (word >= threshold)


def test_draw_follows_the_generator():
    def drawn():
        torch.manual_seed(3)
        return [Dropout.draw(0.5, torch.device("cpu")).state.tolist() for _ in range(2)]

    first, second = drawn()
    assert drawn() == [first, second]
    assert first != second
