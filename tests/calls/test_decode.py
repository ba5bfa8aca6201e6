"""attention_decode on the CPU backends: prefill, then decoding, is one full pass, for every mode."""

from functools import partial

import pytest
import torch

from tests.support.caches import GrowingCache, check_rows_without_keys, sequences
from tests.support.calls import TYPICAL
from tests.support.learned import LEARNED, learned, small
from tests.support.pairs import pairwise
from tritonattn import attention, attention_decode
from tritonattn.scaling import SCALINGS

BACKENDS = ("sdpa", "reference")
WINDOWS = (None, (5, None), (0, 0), (40, 3), (1 << 40, 0))
EVERY = {**{name: partial(small, name) for name in SCALINGS}, **{name: partial(learned, name) for name in LEARNED}}
every_mode = pytest.mark.parametrize("mode", SCALINGS)
PAGES = (None, 16, 19)


GAINS, SINKS = torch.tensor([[1.0], [-2.0], [0.5], [0.0]]), torch.linspace(-3, 2, 2 * 4 * 24).view(2, 4, 24)
EXTRAS = {
    "plain": {},
    "capped": {"gain": GAINS, "softcap": 1.5, "sinks": SINKS},
    "biases": {"key_bias": torch.linspace(-1, 1, 4 * 38, dtype=torch.float64).view(4, 38)},
    "biases of key heads": {"key_bias": torch.linspace(-1, 1, 4 * 38, dtype=torch.float64).view(2, 2, 38)},
    "a bias of all heads": {"key_bias": torch.linspace(-1, 1, 38, dtype=torch.float64)[None]},
}


def cut_biases(options: dict, keys: int) -> dict:
    return {name: x[..., :keys] if name == "key_bias" else x for name, x in options.items()}


@pairwise(mode=EVERY, backend=BACKENDS, statistics=[True, False], page=PAGES, window=WINDOWS, extras=EXTRAS)
@torch.no_grad()
def test_prefill_then_decode_is_one_full_pass(mode, backend, statistics, page, window, extras):
    heads = {"plain": (4, 1), "biases": (4, 4)}.get(extras, (4, 2))
    q, k, v = sequences(heads=heads)
    options = {"scaling": EVERY[mode](), "window": window, "return_aux": True, **EXTRAS[extras]}
    expected, aux = attention(q, k, v, causal=True, backend="reference", **cut_biases(options, k.shape[2]))
    cache = GrowingCache(k, v, 29, page, statistics)
    cache.write([0, 11])
    for count in (1, 4, 2):
        cache.write(count)
        given = {**cache.arguments(), **cut_biases(options, cache.capacity), "backend": backend}
        given |= {"sinks": cache.newest(options["sinks"], count)} if "sinks" in options else {}
        found, found_aux = attention_decode(cache.newest(q, count), **given)
        torch.testing.assert_close(found, cache.newest(expected, count), rtol=1e-11, atol=1e-13)
        for name, row in found_aux._asdict().items():
            torch.testing.assert_close(row, cache.newest(getattr(aux, name), count), msg=name)


@pairwise(mode=TYPICAL, backend=BACKENDS, page=PAGES)
def test_rows_without_keys_give_zeros(backend, page, mode):
    check_rows_without_keys(24, page, scaling=small(mode), backend=backend)


@every_mode
@pytest.mark.parametrize("value", [torch.nan, torch.inf], ids=str)
def test_a_key_that_has_left_the_window_reaches_nothing(mode, value):
    """A record of it, in norms and sums, is in no result of the rows that no longer attend to it."""
    q, k, v = sequences()
    scaling, results = small(mode), []
    for spoilt in (1.0, value):
        k[:, :, 2] = spoilt
        cache = GrowingCache(k, v, 24, statistics=True)
        cache.write([7, 12])
        arguments = cache.arguments() | {"scaling": scaling, "window": (3, 0)}
        results.append(attention_decode(cache.newest(q, 1), **arguments))
        assert results[-1].isfinite().all()
    assert torch.equal(*results)


@every_mode
def test_a_record_of_more_keys_than_a_call_attends_to(mode):
    """key_lengths says how many keys of the record count, as it does for the cache."""
    q, k, v = sequences()
    scaling, cache = small(mode), GrowingCache(k, v, 24, statistics=True)
    cache.write([9, 20])
    arguments = cache.arguments() | {"scaling": scaling, "key_lengths": torch.tensor([7, 20])}
    found = attention_decode(q[:, :, 5:7], **arguments)
    torch.testing.assert_close(found, attention_decode(q[:, :, 5:7], **arguments | {"statistics": None}))
