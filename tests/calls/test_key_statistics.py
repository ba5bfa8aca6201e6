"""KeyStatistics: what it holds after any history, and what it costs."""

import pickle
import random

import pytest
import torch

from tritonattn import KeyStatistics, PagedKeyStatistics

B, H, D, CAPACITY = 3, 2, 5, 20


def _keys(n: int, seed: int = 0, dtype=torch.float32) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(B, H, n, D, generator=generator, dtype=torch.float64).to(dtype)


def _check(statistics: KeyStatistics, held: list[torch.Tensor], rtol: float = 1e-6) -> None:
    """Compare with the keys [H, n, D] that every sequence holds."""
    assert statistics.counts.tolist() == [keys.shape[1] for keys in held]
    for b, keys in enumerate(held):
        norms = keys.double().norm(dim=-1)
        n = norms.shape[1]
        prefixes = {
            "norm_sums": norms.cumsum(-1),
            "norm_square_sums": norms.square().cumsum(-1),
            "norm_maxima": norms.cummax(-1).values if n else norms,
        }
        found = statistics.norms[b, :, :n].double()
        torch.testing.assert_close(found, norms, rtol=rtol, atol=0)
        for name, prefix in prefixes.items():
            found = getattr(statistics, name)[b, :, : n + 1].double()
            torch.testing.assert_close(found, torch.nn.functional.pad(prefix, (1, 0)), rtol=rtol, atol=0)


def test_a_long_random_history():
    """Appends of ragged counts, rejected guesses, beams that move, and copies, after which the original stays."""
    dice = random.Random(0)
    statistics, held = KeyStatistics(B, H, CAPACITY), [torch.empty(H, 0, D)] * B
    for step in range(300):
        action = dice.choice(["append"] * 4 + ["truncate", "reorder", "reset", "select", "grow", "last"])
        before, held_before, room = statistics, held, statistics.capacity
        index = [dice.randrange(B) for _ in held]
        if action == "append":
            counts = [dice.randint(0, min(4, room - keys.shape[1])) for keys in held]
            new = _keys(max(counts), seed=step)
            held = [torch.cat([keys, new[b, :, : counts[b]]], dim=1) for b, keys in enumerate(held)]
            for b, count in enumerate(counts):
                new[b, :, count:] = torch.nan
            statistics.append(new, torch.tensor(counts))
        elif action == "truncate":
            lengths = [dice.randint(0, room) for _ in held] if step % 3 else [dice.randint(0, room)] * B
            held = [keys[:, :length] for keys, length in zip(held, lengths, strict=True)]
            statistics.truncate(torch.tensor(lengths) if step % 3 else lengths[0])
        elif action == "reset" and dice.random() < 0.2:
            held = [torch.empty(H, 0, D)] * B
            statistics.reset()
        elif action == "reorder":
            held = [held[i] for i in index]
            statistics.reorder(torch.tensor(index))
        elif action == "select":
            held, statistics = [held[i] for i in index], statistics.select(torch.tensor(index))
        elif action == "grow":
            statistics = statistics.with_capacity(room + dice.randint(0, 1))
        elif action == "last":
            last = dice.randint(0, CAPACITY + 5)
            held = [keys[:, max(keys.shape[1] - last, 0) :] for keys in held]
            statistics = statistics.last(last, max(last, CAPACITY))
        _check(statistics, held)
        if before is not statistics:
            _check(before, held_before)


@pytest.mark.parametrize("copied", [lambda x: x.select(torch.tensor([2, 0])), lambda x: x.with_capacity(CAPACITY)])
def test_copies_keep_float64(copied):
    statistics, keys = KeyStatistics(B, H, 6, dtype=torch.float64), _keys(6, dtype=torch.float64)
    statistics.append(keys)
    copy = copied(statistics)
    chosen = keys[[2, 0]] if copy.counts.shape == (2,) else keys
    assert copy.capacity == (6 if chosen is not keys else CAPACITY)
    _check(copy, list(chosen), rtol=1e-14)
    assert len(statistics.select(torch.tensor([], dtype=torch.int64)).counts) == 0


def test_pickled_statistics_go_on():
    """The public tensors are views of the memory that `append` writes, in a copy too."""
    k = torch.ones(2, 1, 4)  # 2 keys of norm 2
    ends, table = torch.tensor([0, 2], dtype=torch.int32), torch.zeros(1, 1, dtype=torch.int32)
    one = pickle.loads(pickle.dumps(KeyStatistics(1, 1, 4)))
    one.append(k.transpose(0, 1)[None])
    pages = pickle.loads(pickle.dumps(PagedKeyStatistics(1, 16, 1)))
    pages.append(k, ends, key_lengths=ends[1:], block_table=table)
    assert one.norm_sums.flatten().tolist() == [0, 2, 4, 0, 0]
    assert pages.norm_sums.flatten()[:3].tolist() == [2, 4, 0]


def test_buffers_stay_where_they_are():
    """As a CUDA graph needs; and keys that require gradients leave none."""
    statistics = KeyStatistics(B, H, CAPACITY)
    before = {name: x.data_ptr() for name, x in vars(statistics).items() if isinstance(x, torch.Tensor)}
    statistics.append(_keys(7).requires_grad_())
    assert not any(x.requires_grad for x in vars(statistics).values() if isinstance(x, torch.Tensor))
    statistics.truncate(5)
    statistics.reorder(torch.tensor([2, 2, 0]))
    statistics.reset()
    assert before == {name: x.data_ptr() for name, x in vars(statistics).items() if isinstance(x, torch.Tensor)}
