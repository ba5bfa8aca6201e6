"""The decode kernels: prefill, then decoding, against one full pass; splits, pages, groups, NaN, repeatability."""

from dataclasses import replace

import pytest
import torch

from tests.support.caches import GrowingCache, cached_call, check_newest, check_rows_without_keys, sequences
from tests.support.pairs import in_turn, pairwise
from tritonattn import attention, attention_decode
from tritonattn.backends import triton as triton_backend
from tritonattn.backends.triton import launch
from tritonattn.scaling import Grok2

MODES = ("sqrt_dim", "log_key_count", "key_norm_sum", "key_norm_rms", "key_norm_max", "cosine")
MODES += ("scale_invariant", "behind a softcap")
# With 16 keys per block and 4 blocks in the shortest split: up to 3 splits.
LENGTH, CAPACITY = 150, 171

pytestmark = pytest.mark.usefixtures("small_tiles")


def _check(dtype, device, *, written=(70, 149), heads=(4, 2), dims=(16, 24), **options):
    check_newest(dtype, device, written, LENGTH, CAPACITY, heads=heads, dims=dims, **options)


@pairwise(dtype=[torch.float32, torch.float16, torch.bfloat16], page=[None, 23], count=[1, 5], invariant=[False, True])
def test_dtypes_layouts_and_new_tokens(dtype, page, count, invariant, device):
    _check(dtype, device, page=page, count=count, invariant=invariant, scaling="cosine")


BEHIND = {"behind a softcap": {"scaling": Grok2(4, after_softcap=True), "softcap": 1.5}}


@in_turn(mode=[*MODES, "key_norm_max", "cosine"], statistics=[True] * len(MODES) + [False] * 2)
def test_modes(mode, statistics, device):
    options = BEHIND.get(mode, {"scaling": mode})
    _check(torch.float32, device, statistics=statistics, page=19, count=2, window=(80, None), **options)


@in_turn(count=[1, 3], window=[(1000, None), (20, None), (90, 5), (0, 0)])
def test_windows(window, count, device):
    _check(torch.float32, device, window=window, count=count, scaling="key_norm_max", page=17)


@pairwise(
    bias_heads=[1, 2, 4],
    page=[None, 16],
    count=[1, 3],
    softcap=[None, 1.5],
    window=[None, (80, None)],
    invariant=[False, True],
)
def test_biases_of_keys(bias_heads, page, count, softcap, window, invariant, device):
    """A row for all heads, for each key head and for each query head."""
    options = {"softcap": softcap, "window": window, "invariant": invariant}
    options["sinks"] = torch.linspace(-1, 2, 8 * LENGTH, device=device).view(2, 4, -1)
    _check(torch.float32, device, bias_heads=bias_heads, page=page, count=count, **options)


@pytest.mark.parametrize("page", [18, 33, 200])
def test_pages_of_any_size(page, device):
    _check(torch.float32, device, page=page, count=2, scaling="key_norm_rms", window=(100, None))


@pytest.mark.parametrize(("blocks", "splits"), [(4, 3), (6, 2), (64, 1)])
def test_a_config_says_how_long_splits_are(blocks, splits, device, monkeypatch):
    """11 blocks of keys are split alike in any batch."""
    default, run, grids = launch.config_for, launch.run, []
    monkeypatch.setattr(launch, "config_for", lambda *asked: replace(default(*asked), split_blocks=blocks))

    def watch(kernel, grid, arguments, config):
        grids.append(grid) if kernel.__name__ == "attention_decode" else None
        run(kernel, grid, arguments, config)

    monkeypatch.setattr(launch, "run", watch)
    _check(torch.float32, device, page=16, window=(1000, None), scaling="key_norm_mean")
    assert grids == [(splits, 2, 2)]


@pytest.mark.parametrize(("heads", "count"), [((1, 1), 16), ((6, 2), 7), ((20, 1), 4), ((5, 5), 2)], ids=str)
def test_groups_and_new_tokens(heads, count, device):
    """Up to 80 packed rows, in tiles of 16."""
    _check(torch.float32, device, heads=heads, count=count, gain=-0.7)


@pytest.mark.parametrize("dims", [(1, 1), (17, 8), (96, 40), (192, 128), (576, 512)], ids=str)
def test_head_dims(dims, device):
    _check(torch.float32, device, dims=dims, heads=(2, 1), scaling="cosine")


@in_turn(written=[(1, 2), (16, 17), (64, 65), (128, 129)], softcap=[None, 1.5])
def test_lengths_softcap_and_sinks(written, softcap, device):
    """One to three splits in use of three."""
    sinks = torch.tensor([0.3, -2.0, 4.0, 0.0], device=device)
    for count in (1, min(3, *written)):
        _check(torch.float32, device, written=written, count=count, softcap=softcap, sinks=sinks, scaling=0.8)


def test_default_tiles(device, monkeypatch):
    monkeypatch.undo()
    _check(torch.float16, device, dims=(64, 64), page=16, scaling="key_norm_mean")
    _check(torch.float32, device, dims=(64, 64), heads=(8, 1), count=3)


@in_turn(page=[None, 16], capacity=[40, 171])
def test_rows_without_keys(page, capacity, device):
    sinks = torch.tensor([0.0, 1.0, -torch.inf, 5.0], device=device)
    check_rows_without_keys(
        capacity, page, torch.float32, device, scaling="key_norm_rms", sinks=sinks, backend="triton"
    )


@in_turn(dtype=[torch.int64, torch.int32], page=[None, 16])
def test_wild_lengths_are_clamped(dtype, page, device):
    """Below the checks, as values on a GPU: nothing outside the cache is read."""
    q, k, v = sequences(torch.float32, length=48, dims=(16, 16), device=device)
    cache = GrowingCache(k, v, 48, page)
    cache.write(48)
    table = cache.arguments().get("block_table")
    lengths = torch.tensor([-7, torch.iinfo(dtype).max], dtype=dtype, device=device)
    call = cached_call(q[:, :, -1:], cache.k, cache.v, lengths, table)
    found = triton_backend.decode(call, aux=False).out
    assert (found[0] == 0).all()
    assert torch.equal(found[1], attention_decode(q[:, :, -1:], **cache.arguments(), backend="triton")[1])


def test_wild_pages_count_as_zeros(device):
    """Page numbers below 0 and from N on; the memory on either side of the pages is NaN."""
    q, k, v = sequences(torch.float32, length=48, dims=(16, 16), device=device)
    cache = GrowingCache(k, v, 48, page=16)
    cache.write(48)
    surround = (0, 0, 0, 0, 0, 0, 1, 1)
    pages = [torch.nn.functional.pad(x, surround, value=torch.nan)[1:-1] for x in (cache.k, cache.v)]
    table = cache.arguments()["block_table"]
    for b, number in enumerate((-1, len(cache.k))):
        table[b, 1] = number
        cache.k[cache.numbers[b, 1]] = cache.v[cache.numbers[b, 1]] = 0
    call = cached_call(q[:, :, -1:], *pages, cache.lengths, table)
    assert torch.equal(
        triton_backend.decode(call, aux=False).out,
        attention_decode(q[:, :, -1:], **cache.arguments(), backend="triton"),
    )


@pairwise(page=[None, 16], window=[None, 40], capacity=[60, CAPACITY])
def test_new_tokens_of_each_sequence(page, window, capacity, device):
    """Rows of each sequence as in a call of that many rows; those behind them have no keys."""
    q, k, v = sequences(torch.float32, batch=3, length=LENGTH, dims=(16, 24), device=device)
    cache = GrowingCache(k, v, capacity, page)
    cache.write([30, 58, 3])
    counts = torch.tensor([1, 4, 0], device=device)
    table = cache.arguments().get("block_table")
    call = cached_call(q[:, :, :4], cache.k, cache.v, cache.lengths, table, counts, window)
    found = triton_backend.decode(call, aux=True)
    for b, count in enumerate(counts.tolist()):
        if count:
            one = slice(b, b + 1)
            keys = (cache.k, cache.v) if page else (cache.k[one], cache.v[one])
            given = *keys, cache.lengths[one], None if table is None else table[one]
            alone = triton_backend.decode(cached_call(q[one, :, :count], *given, left=window), aux=True)
            for x, y in zip(found, alone, strict=True):
                torch.testing.assert_close(x[one, :, :count], y, rtol=1e-6, atol=1e-6)
        assert (found.out[b, :, count:] == 0).all()
        assert (found.lse[b, :, count:] == -torch.inf).all()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("mode", ["sqrt_dim", "key_norm_mean", "key_norm_max", "cosine"])
@pytest.mark.parametrize("page", [None, 16])
def test_cuda_graph(mode, page, device):
    """Append and decode, captured once, replayed as the cache grows."""
    q, k, v = sequences(torch.float16, length=LENGTH, dims=(64, 64), device=device)
    expected = attention(q, k, v, scaling=mode, causal=True)
    cache = GrowingCache(k, v, CAPACITY, page, statistics=True)
    cache.write([60, 100])
    record, cache.record = cache.record, None
    cache.write(1)
    table = {} if page is None else {"block_table": cache.numbers.int()}
    query, key, lengths = cache.newest(q, 1), cache.newest(k, 1), cache.lengths.clone()

    def step():
        record.append(key)
        return attention_decode(query, cache.k, cache.v, key_lengths=lengths, scaling=mode, statistics=record, **table)

    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    record.truncate(lengths - 1)
    with torch.cuda.graph(graph):
        out = step()
    record.truncate(lengths - 1)
    for _ in range(5):
        query.copy_(cache.newest(q, 1)), key.copy_(cache.newest(k, 1)), lengths.copy_(cache.lengths)
        graph.replay()
        torch.testing.assert_close(out, cache.newest(expected, 1), rtol=5e-3, atol=5e-3)
        cache.write(1)


@in_turn(
    kind=["tensor", "number", "sequence"],
    mode=["inkling2", "sqrt_dim", "key_norm_mean"],
    page=[None, 19],
    statistics=[True, False],
    invariant=[False, True],
)
def test_8_bit_caches(kind, mode, page, statistics, invariant, device):
    options = {"page": page, "statistics": statistics, "invariant": invariant, "scaling": mode}
    _check(torch.float32, device, written=(5, 90), eight_bit=kind, count=2, **options)
