"""Calls over a cache as an operator: under opcheck, torch.compile and fake tensors; and the pages that it needs."""

import pytest
import torch
from torch.library import opcheck

import tritonattn
from tests.support.caches import GrowingCache, cached_call, sequences
from tests.support.pairs import in_turn
from tests.support.watch import Watch
from tritonattn import KeyStatistics, attention_decode, ops
from tritonattn.ops.operators import flat

pytestmark = [  # torch's, while it traces and compiles
    pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:.torch.jit.script"),
]


def _grown(page=None, dtype=torch.float32, statistics=True):
    q, k, v = sequences(dtype)
    cache = GrowingCache(k, v, 24, page, statistics)
    cache.write([9, 20])
    return cache.newest(q, 3), cache


def _call(page, **options):
    query, cache = _grown(page)
    given = cache.arguments()
    record = given["k_cache"], given["v_cache"], given["key_lengths"], given.get("block_table")
    return cached_call(query, *record, **options)


OPTIONS = {
    "plain": {},
    "window and softcap": {"left": 4, "softcap": 2.0},
    "scales and sinks": {
        "query_scale": torch.randn(2, 4, 3),
        "key_scale": torch.randn(2, 2, 32),
        "key_bias": torch.randn(2, 2, 2, 32),
        "sinks": torch.randn(2, 4, 3),
    },
}


@in_turn(options=OPTIONS, page=[None, None, 16], aux=[False, True, True])
def test_opcheck(options, page, aux):
    opcheck(torch.ops.tritonattn.forward.default, (*flat(_call(page, **OPTIONS[options], aux=aux)), False))


@pytest.mark.slow
def test_a_compiled_step_appends_and_decodes_without_recompiling():
    q, k, v = sequences(torch.float32)
    cache = GrowingCache(k, v, 24)
    record = KeyStatistics(2, 2, 24)
    compiles = []

    def backend(graph, example):
        compiles.append(graph)
        return graph

    @torch.compile(fullgraph=True, backend=backend)
    def step(query, key, k_cache, v_cache, key_lengths):
        record.append(key)
        return attention_decode(
            query, k_cache, v_cache, key_lengths=key_lengths, scaling="key_norm_mean", statistics=record
        )

    torch._dynamo.reset()
    expected = tritonattn.attention(q, k, v, scaling="key_norm_mean", causal=True)
    for _ in range(4):
        cache.write(1)
        found = step(cache.newest(q, 1), cache.newest(k, 1), cache.k, cache.v, cache.lengths)
        torch.testing.assert_close(found, cache.newest(expected, 1))
    assert len(compiles) == 1


@pytest.mark.parametrize("scaling", ["sqrt_dim", "key_norm_sum", "key_norm_max", "cosine"])
def test_a_step_with_statistics_copies_no_cache(scaling):
    """Pages stay where they are: nothing outside the operator is as large as the keys."""
    query, cache = _grown(16)
    arguments = cache.arguments()
    arguments |= {name: arguments[name].repeat(1, 1, 1, 8) for name in ("k_cache", "v_cache")}
    query = query.repeat(1, 1, 1, 8)
    with Watch() as watch:
        attention_decode(query, **arguments, scaling=scaling)
    gathered = 2 * 2 * cache.capacity * query.shape[3] * 4
    assert watch.calls["tritonattn::forward"] == 1
    assert watch.largest < gathered


def test_a_scaling_with_a_parameter_is_refused_while_gradients_are_recorded():
    class Learned(tritonattn.Scaling):
        def __init__(self):
            self.parameter = torch.ones((), requires_grad=True)

        def scales(self, q, k, visibility, statistics):
            return tritonattn.Scales(1.0, query=self.parameter)

    query, cache = _grown()
    with pytest.raises(NotImplementedError, match="scaling: attention_decode has no gradient"):
        attention_decode(query, **cache.arguments(), scaling=Learned())
    with torch.no_grad():
        assert not attention_decode(query, **cache.arguments(), scaling=Learned()).requires_grad


def test_lengths_and_pages_that_are_not_read_are_clamped():
    """As on a GPU: through the operator, below the checks."""
    query, cache = _grown(16)
    lengths, table = torch.tensor([-5, 1 << 40]), cache.arguments()["block_table"]
    out = ops.attention(cached_call(query, cache.k, cache.v, lengths, torch.full_like(table, 1 << 30))).out
    assert (out == 0).all()  # no keys; and keys and values of zeros
    query, cache = _grown()
    keys, values = (x.nan_to_num(0.5) for x in (cache.k, cache.v))
    found = ops.attention(cached_call(query, keys, values, lengths, left=6)).out
    expected = attention_decode(query, keys, values, key_lengths=torch.tensor([0, 24]), scaling=0.25, window=(6, None))
    torch.testing.assert_close(found, expected)
