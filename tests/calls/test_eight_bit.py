"""8-bit caches: results are those over the dequantised keys and values, whose norms a scaling reads."""

from functools import partial

import pytest
import torch

import tritonattn
from tests.support.bound import assert_within_bound
from tests.support.caches import GrowingCache, sequences
from tests.support.eight_bit import along, descale_of, in_pages, quantised
from tests.support.learned import small
from tests.support.packed import one_by_one
from tests.support.pages import PagedBatch
from tests.support.pairs import pairwise
from tests.support.refusals import refuses
from tritonattn import PagedKeyStatistics, attention, attention_decode, attention_varlen

from .test_pages import FirstOfKeys

BACKENDS = ("sdpa", "reference")
KINDS = ("none", "number", "tensor", "head", "sequence")
DTYPES = (torch.float64, torch.float32, torch.bfloat16)
EIGHT_BIT = torch.float8_e4m3fn


MODES = {**{name: partial(small, name) for name in ("log_key_count", "key_norm_mean", "inkling2")}, "own": FirstOfKeys}


@pairwise(mode=MODES, backend=BACKENDS, kind=KINDS, page=(None, 19), statistics=[True, False], dtype=DTYPES)
@torch.no_grad()
def test_decode_is_attention_over_the_dequantised_cache(mode, backend, kind, page, statistics, dtype):
    q, k, v = sequences()
    k_descale, v_descale = (descale_of(kind, 2, 2, seed) for seed in (0, 1))
    (k8, k), (v8, v) = quantised(k, along(k_descale)), quantised(v, along(v_descale))
    q, options = q.to(dtype), {"scaling": MODES[mode](), "gain": torch.linspace(-1, 2, 4)[:, None], "softcap": 2.0}
    whole = {"causal": True, "backend": "reference", **options}
    exact, aux = attention(q.double(), k, v, return_aux=True, **whole)
    eager = attention(q, k.to(dtype), v.to(dtype), **whole)

    cache = GrowingCache(k8, v8, 29, page)
    for counts in ([1, 12], 3):
        cache.write(counts)
    options |= {"k_descale": k_descale, "v_descale": v_descale, "backend": backend, "return_aux": True}
    if statistics:
        wide = torch.promote_types(dtype, torch.float32)
        options["statistics"] = tritonattn.KeyStatistics(2, 2, cache.capacity, dtype=wide)
        options["statistics"].append(k[:, :, :15].to(wide), cache.lengths)
    out, found = attention_decode(cache.newest(q, 3), **cache.arguments(), **options)
    assert out.dtype == dtype
    assert_within_bound(out, cache.newest(exact, 3), cache.newest(eager, 3), dtype)
    for name, rows in found._asdict().items():
        torch.testing.assert_close(rows.double(), cache.newest(getattr(aux, name), 3), rtol=1e-5, atol=1e-5, msg=name)


@pairwise(mode=MODES, backend=BACKENDS, kind=KINDS, recorded=[True, False], invariant=[True, False])
@torch.no_grad()
def test_packed_rows_over_dequantised_pages(mode, backend, kind, recorded, invariant):
    rows, keys = (5, 1, 0, 7), (21, 40, 7, 7)
    batch, scaling = PagedBatch(rows, keys, 16, tails=(1, 0)), MODES[mode]()
    arguments, k, v = in_pages(batch, *(descale_of(kind, 4, 2, seed) for seed in (0, 1)))
    masks = {"causal": True, "window": (30, None)}
    expected, aux = one_by_one(batch.packed, batch.q, k, v, scaling=scaling, **masks)
    if recorded:
        record = arguments["statistics"] = PagedKeyStatistics(len(batch.pages), 16, 2, dtype=torch.float64)
        ends = arguments["cu_seqlens_k"]
        record.append(k, ends, key_lengths=batch.key_lengths, block_table=batch.table)
    options = {"backend": backend, "return_aux": True}
    options["batch_invariant"] = invariant and backend == "sdpa"
    found, rows_found = attention_varlen(**arguments, scaling=scaling, **masks, **options)
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-9)  # descales are of fp32
    torch.testing.assert_close(rows_found.lse, aux.lse, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_sequence_without_keys_needs_no_descale(backend):
    q, k, v = (x.float() for x in sequences())
    (k8, _), (v8, _) = quantised(k, 0.03), quantised(v, 0.02)
    descale = torch.tensor([[torch.nan, torch.inf], [0.03, 0.02]])
    found = attention_decode(
        q[:, :, :1], k8, v8, key_lengths=torch.tensor([0, 20]), k_descale=descale, v_descale=descale, backend=backend
    )
    assert not found[0].any()
    assert found[1].isfinite().all()


def test_a_decode_step_compiles():
    q, k, v = (x.float() for x in sequences())
    (k8, _), (v8, _) = quantised(k, 0.03), quantised(v, 0.02)
    given = {"k_cache": k8, "v_cache": v8, "key_lengths": torch.tensor([3, 24]), "scaling": "key_norm_mean"}
    given |= {"k_descale": torch.tensor([0.03, 0.02]), "v_descale": 0.02}
    torch._dynamo.reset()
    compiled = torch.compile(attention_decode, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(q[:, :, :1], **given), attention_decode(q[:, :, :1], **given))


def test_autocast_leaves_the_cache_as_it_is():
    q, k, v = (x.float() for x in sequences())
    (k8, _), (v8, _) = quantised(k, 0.03), quantised(v, 0.02)
    given = {"k_cache": k8, "v_cache": v8, "key_lengths": torch.tensor([3, 24]), "k_descale": 0.03}
    with torch.autocast("cpu", torch.bfloat16):
        found = attention_decode(q[:, :, :1], **given)
    assert torch.equal(found, attention_decode(q[:, :, :1].bfloat16(), **given))


Q, K = torch.ones(2, 4, 1, 8), torch.ones(2, 2, 24, 8).to(EIGHT_BIT)
DECODE = {"q": Q, "k_cache": K, "v_cache": K, "key_lengths": torch.tensor([9, 20])}
FLAT = {"q": Q[:, :, 0], "k": K[:, :, 0], "v": K[:, :, 0], "max_seqlen_q": 1, "max_seqlen_k": 1}
FLAT |= dict.fromkeys(("cu_seqlens_q", "cu_seqlens_k"), torch.arange(3, dtype=torch.int32))
OTHER = torch.ones(2, 2, 24, 8).to(torch.float8_e4m3fnuz)
IN_DENSE = "TypeError: q, k, v: ~ one dtype, ~ torch.float8_e4m3fn is for the cache of attention_decode"


@pytest.mark.parametrize(
    ("function", "arguments", "error"),
    [
        (attention, {"q": Q, "k": K, "v": K}, IN_DENSE),
        (tritonattn.scaled_attention, {"q": Q, "k": K, "v": K}, IN_DENSE),
        (attention_varlen, FLAT, IN_DENSE),
        (attention_decode, {"k_cache": OTHER, "v_cache": OTHER}, "TypeError: ~ or torch.float8_e4m3fn of k ~ e4m3fnuz"),
        (attention_decode, {"v_cache": K.float()}, "TypeError: q, k_cache, v_cache: ~ float8_e4m3fn of k and v"),
        (attention_decode, {"q": K[:, :, :1]}, "TypeError: q: ~ float32 ~ float8_e4m3fn"),
        (attention_decode, {"k_descale": "a"}, "TypeError: k_descale: ~ number ~ 'a'"),
        (attention_decode, {"v_descale": torch.ones(3)}, "ValueError: v_descale: ~ [B, Hkv] = [2, 2] ~ [3]"),
        (attention_decode, {"v_descale": torch.ones(2).int()}, "TypeError: v_descale: ~ float32 ~ torch.int32"),
        (attention_decode, {"k_descale": float("nan")}, "ValueError: k_descale: ~ finite ~ nan"),
        (
            attention_decode,
            {"k_cache": K.float(), "v_cache": K.float(), "k_descale": 2.0},
            "ValueError: k_descale: ~ None for keys and values of torch.float32",
        ),
        (
            attention_decode,
            {"v_descale": torch.ones(2, requires_grad=True)},
            "NotImplementedError: v_descale: attention_decode has no gradient",
        ),
    ],
)
def test_refusals(function, arguments, error):
    refuses(error, function, **((DECODE if function is attention_decode else {}) | arguments))


def test_a_word_of_another_library_in_a_call_without_a_cache():
    with pytest.raises(TypeError, match="attention: expected no k_descale=: 8-bit keys and values are for attention_d"):
        attention(Q, Q, Q, k_descale=2.0)  # pyright: ignore[reportCallIssue]


def test_a_record_takes_dequantised_keys():
    record = tritonattn.KeyStatistics(2, 2, 24)
    with pytest.raises(TypeError, match=r"k_new: expected float16, .*got torch.float8_e4m3fn"):
        record.append(K)
