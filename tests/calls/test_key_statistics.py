"""KeyStatistics: what it holds after any history, and in which memory."""

import random

import pytest
import torch

from tritonattn import KeyStatistics

H, D, CAPACITY = 2, 5, 20
NAMES = ("norms", "norm_sums", "norm_square_sums", "norm_maxima")
IN_PLACE, COPIES = ("append", "append", "append", "truncate", "reorder", "reset"), ("select", "with_capacity", "last")


def _check(statistics: KeyStatistics, held: list[torch.Tensor], rtol: float) -> None:
    """Compare with the keys [H, n, D] that every sequence holds."""
    assert statistics.counts.tolist() == [keys.shape[1] for keys in held]
    for b, keys in enumerate(held):
        norms = keys.double().norm(dim=-1)
        totals = norms.cumsum(-1), norms.square().cumsum(-1), norms.cummax(-1).values if keys.shape[1] else norms
        expected = norms, *(torch.nn.functional.pad(total, (1, 0)) for total in totals)
        for name, values in zip(NAMES, expected, strict=True):
            found = getattr(statistics, name)[b, :, : values.shape[1]].double()
            torch.testing.assert_close(found, values, rtol=rtol, atol=0)


# float64 as for a float64 cache: copies keep the dtype.
@pytest.mark.parametrize(("dtype", "rtol"), [(torch.float32, 1e-6), (torch.float64, 1e-14)], ids=str)
def test_a_long_random_history(dtype, rtol):
    """Appends of ragged counts, rejected guesses, beams that change sequences, and copies, of which the last goes on.

    Buffers stay where they are, as a CUDA graph needs, and keys that require gradients leave none.
    """
    dice, draw = random.Random(0), torch.Generator().manual_seed(0)
    statistics, held = KeyStatistics(3, H, CAPACITY, dtype=dtype), [torch.empty(H, 0, D)] * 3
    copied = statistics, held
    for step in range(300):
        action = dice.choice(IN_PLACE + COPIES)
        if action in COPIES:
            copied = statistics, held
        buffers = [getattr(statistics, name).data_ptr() for name in ("counts", *NAMES)]
        if action == "append":
            counts = [dice.randint(0, min(4, statistics.capacity - keys.shape[1])) for keys in held]
            new = torch.randn(len(held), H, max(counts), D, generator=draw, dtype=torch.float64).to(dtype)
            held = [torch.cat([keys, new[b, :, : counts[b]]], dim=1) for b, keys in enumerate(held)]
            for b, count in enumerate(counts):
                new[b, :, count:] = torch.nan
            statistics.append(new.requires_grad_(), torch.tensor(counts))
            assert not statistics.norm_sums.requires_grad
        elif action == "truncate":
            lengths = [dice.randint(0, statistics.capacity) for _ in held]
            lengths = lengths if step % 3 else lengths[:1] * len(held)
            held = [keys[:, :length] for keys, length in zip(held, lengths, strict=True)]
            statistics.truncate(torch.tensor(lengths) if step % 3 else lengths[0])
        elif action == "reorder":
            index = [dice.randrange(len(held)) for _ in held]
            held = [held[i] for i in index]
            statistics.reorder(torch.tensor(index))
        elif action == "reset":
            held = [torch.empty(H, 0, D)] * len(held)
            statistics.reset()
        elif action == "select":
            index = [dice.randrange(len(held)) for _ in range(dice.randint(1, 5))]
            held = [held[i] for i in index]
            statistics = statistics.select(torch.tensor(index))
        elif action == "with_capacity":
            statistics = statistics.with_capacity(statistics.capacity + dice.randint(0, 3))
        else:
            count = dice.randint(0, 9)
            held = [keys[:, max(keys.shape[1] - count, 0) :] for keys in held]
            statistics = statistics.last(count, CAPACITY)
        is_same = buffers == [getattr(statistics, name).data_ptr() for name in ("counts", *NAMES)]
        assert is_same == (action in IN_PLACE)
        _check(statistics, held, rtol)
        if statistics is not copied[0]:
            _check(*copied, rtol)
    assert len(statistics.select(torch.tensor([], dtype=torch.int64)).counts) == 0
