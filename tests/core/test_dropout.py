"""The keep bits: Philox as published, a function of the position alone, and of the right rate."""

import pytest
import torch

from tritonattn.core.dropout import Dropout

# Random123's known answers for philox4x32-10 (kat_vectors): counter, key, words of the result.
KNOWN_ANSWERS = [
    ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]


def philox(counter, key):
    """Philox4x32-10 on Python integers, after Salmon et al. 2011, section 3.3."""
    mask = 2**32 - 1
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(10):
        high0, low0 = divmod(0xD2511F53 * c0, 2**32)
        high1, low1 = divmod(0xCD9E8D57 * c2, 2**32)
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0, k1 = (k0 + 0x9E3779B9) & mask, (k1 + 0xBB67AE85) & mask
    return c0, c1, c2, c3


def is_kept(position, first, seed, offset, p, heads):
    """The bit of (b, h, i, j) where the sequence's first key is `first`."""
    b, h, i, j = position
    group, word = divmod(j - first, 4)
    counter = first + 4 * group, i, b * heads + h, offset
    return philox(counter, (seed & 0xFFFFFFFF, seed >> 32))[word] >= int(p * 2**32)


def state(seed, offset):
    signed = seed - 2**64 if seed >= 2**63 else seed
    return torch.tensor([signed, offset], dtype=torch.int64)


@pytest.mark.parametrize("number", range(4))
@pytest.mark.parametrize(("counter", "key", "words"), KNOWN_ANSWERS)
def test_known_answers(counter, key, words, number):
    """A word, read through the keep bit: kept at p = word / 2^32, dropped one step above."""
    assert philox(counter, key) == words
    seed = key[0] | key[1] << 32
    group, row, head, offset = counter
    position = [torch.tensor(x) for x in (0, head, row, group + number)]
    for step, kept in ((0, True), (1, False)):
        dropout = Dropout((words[number] + step) / 2**32, state(seed, offset))
        assert dropout.keep(*position, first=group, q_heads=1).item() is kept


SEED, OFFSET, P = 0x9234_5678_9ABC_DEF0, 77, 0.3
ARGUMENTS = {"seed": SEED, "offset": OFFSET, "p": P}


def test_bits_are_philox_of_the_position():
    tile = Dropout(P, state(SEED, OFFSET)).tile((2, 3), slice(0, 4), slice(0, 11))
    for position in torch.cartesian_prod(*(torch.arange(n) for n in tile.shape)).tolist():
        assert tile[tuple(position)].item() == is_kept(position, 0, **ARGUMENTS, heads=3)


def test_the_groups_of_a_sequence_begin_at_its_first_key():
    firsts = [0, 0, 5, 11, 11]
    tile = Dropout(P, state(SEED, OFFSET)).tile((1, 3), slice(2, 7), slice(3, 20), torch.tensor(firsts))
    for h, i, j in torch.cartesian_prod(*(torch.arange(n) for n in tile.shape[1:])).tolist():
        position = 0, h, 2 + i, 3 + j
        assert tile[0, h, i, j].item() == is_kept(position, firsts[i], **ARGUMENTS, heads=3)


@pytest.mark.parametrize("width", [1, 4, 7, 64])
def test_runs_of_keys_have_the_bits_of_their_positions(width):
    dropout = Dropout(P, state(SEED, OFFSET))
    head, row, first = torch.tensor([[1], [4]]), torch.arange(6, 11), 13
    whole = dropout.tile((3, 5), slice(6, 11), slice(first, first + 8 + width), torch.full((5,), first))
    for skipped in (0, 8):
        kept = torch.empty(2, 5, width, dtype=torch.bool)
        dropout.keep_run(kept, 2, head, row, first + skipped, q_heads=5)
        assert torch.equal(kept, whole[2, [1, 4], :, skipped : skipped + width])


def test_neighbours_are_independent():
    """Any two of a group's four keys are dropped together with chance p^2."""
    kept = Dropout(0.5, state(3, 1)).tile((1, 1), slice(0, 1024), slice(0, 1024))[0, 0].double() - 0.5
    of_groups = kept.view(1024, 256, 4)
    products = of_groups.flatten(0, 1).mT @ of_groups.flatten(0, 1) / 1024 / 256
    torch.testing.assert_close(products, torch.eye(4).double() / 4, rtol=0, atol=5 * 0.25 / 512)


def test_draw_follows_the_generator():
    def drawn():
        torch.manual_seed(3)
        return [Dropout.draw(0.5, torch.device("cpu")).state.tolist() for _ in range(2)]

    first, second = drawn()
    assert drawn() == [first, second]
    assert first != second
