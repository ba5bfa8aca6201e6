"""KeyStatistics: what it holds after any history, and what it costs."""

import pickle
import random

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
    """Appends of ragged counts, rejected guesses, beams that change places, and a reset."""
    dice = random.Random(0)
    statistics = KeyStatistics(B, H, CAPACITY)
    held = [torch.empty(H, 0, D)] * B
    for step in range(200):
        action = dice.choice(["append", "append", "append", "truncate", "reorder", "reset"])
        if action == "append":
            counts = [dice.randint(0, min(4, CAPACITY - keys.shape[1])) for keys in held]
            new = _keys(max(counts), seed=step)
            held = [torch.cat([keys, new[b, :, : counts[b]]], dim=1) for b, keys in enumerate(held)]
            for b, count in enumerate(counts):
                new[b, :, count:] = torch.nan
            statistics.append(new, torch.tensor(counts))
        elif action == "truncate":
            lengths = [dice.randint(0, CAPACITY) for _ in held] if step % 3 else [dice.randint(0, CAPACITY)] * B
            held = [keys[:, :length] for keys, length in zip(held, lengths, strict=True)]
            statistics.truncate(torch.tensor(lengths) if step % 3 else lengths[0])
        elif action == "reorder":
            index = [dice.randrange(B) for _ in held]
            held = [held[i] for i in index]
            statistics.reorder(torch.tensor(index))
        elif dice.random() < 0.2:
            held = [torch.empty(H, 0, D)] * B
            statistics.reset()
        _check(statistics, held)


EXACT = {"dtype": torch.float64}  # beside a float64 cache that has grown `attention_decode` asks for float64 again


def test_selected_sequences_are_a_copy():
    statistics, keys = KeyStatistics(B, H, CAPACITY, **EXACT), _keys(6, **EXACT)
    statistics.append(keys, torch.tensor([6, 0, 4]))
    held = [keys[0], keys[1, :, :0], keys[2, :, :4]]
    index = [2, 2, 0, 1, 2]
    chosen = statistics.select(torch.tensor(index))
    _check(chosen, [held[i] for i in index], rtol=1e-14)
    chosen.append(_keys(1, seed=1)[[0] * len(index)])
    _check(statistics, held)
    assert len(statistics.select(torch.tensor([], dtype=torch.int64)).counts) == 0


def test_more_room_keeps_what_is_held():
    statistics, keys, more = KeyStatistics(B, H, 6, **EXACT), _keys(6, **EXACT), _keys(5, seed=1, **EXACT)
    statistics.append(keys)
    larger = statistics.with_capacity(CAPACITY)
    assert (larger.capacity, statistics.capacity) == (CAPACITY, 6)
    larger.append(more)
    _check(larger, list(torch.cat([keys, more], dim=2)), rtol=1e-14)
    _check(statistics, list(keys))
    _check(statistics.with_capacity(6), list(keys))


def test_the_last_keys_are_a_copy():
    statistics, keys = KeyStatistics(B, H, CAPACITY, **EXACT), _keys(9, **EXACT)
    more = _keys(3, seed=1, **EXACT)
    counts = [9, 2, 0, 5][:B]
    statistics.append(keys, torch.tensor(counts))
    for last in (0, 1, 4, 9, CAPACITY + 5):
        one = statistics.last(last, last + 3)
        held = [own[:, max(count - last, 0) : count] for own, count in zip(keys, counts, strict=True)]
        _check(one, held, rtol=1e-14)
        one.append(more)
        _check(one, [torch.cat([old, new], dim=1) for old, new in zip(held, more, strict=True)])
    _check(statistics, [own[:, :count] for own, count in zip(keys, counts, strict=True)])


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
