"""Few bf16 rows by products in bf16: the bound, which calls take it, and what oneDNN's products lose."""

import pytest
import torch

import tritonattn
from tests.support.bound import assert_within_bound
from tests.support.pairs import pairwise
from tritonattn.backends.cpu import few_rows

pytestmark = pytest.mark.skipif(not few_rows._adds_in_fp32(), reason="products of bf16 do not add up in fp32 here")


@pytest.fixture
def taken(monkeypatch):
    """True for each call so far that had its output from here."""
    answers, takes, attention = [], few_rows.takes, few_rows.attention

    def asked(call):
        if not (is_taken := takes(call)):
            answers.append(False)
        return is_taken

    def attended(call):
        found = attention(call)
        answers.append(found is not None)
        return found

    monkeypatch.setattr(few_rows, "takes", asked)
    monkeypatch.setattr(few_rows, "attention", attended)
    return answers


def operands(heads=(4, 4), rows=1, keys=300, batch=2, dims=(64, 64)):
    random = torch.Generator().manual_seed(keys)
    shapes = (heads[0], rows, dims[0]), (heads[1], keys, dims[0]), (heads[1], keys, dims[1])
    return [torch.randn(batch, *shape, generator=random).bfloat16() for shape in shapes]


def step(q, k, v, length, dtype=torch.bfloat16, backend="sdpa", **options):
    lengths = torch.full((q.shape[0],), length)
    q, k, v = (x.to(dtype) for x in (q, k, v))
    return tritonattn.attention_decode(q, k, v, key_lengths=lengths, backend=backend, **options)


def check(operands, length, **options):
    q, k, v = operands
    written = [q, k[:, :, :length], v[:, :, :length]]
    exact, eager = (
        tritonattn.attention(*[x.to(dtype) for x in written], backend="reference", **options)
        for dtype in (torch.float64, torch.bfloat16)
    )
    assert_within_bound(step(*operands, length, **options), exact, eager, torch.bfloat16)


@pairwise(
    scaling=["sqrt_dim", "log_key_count:64", "key_norm_mean", "cosine", -0.1],
    heads=[(4, 4), (8, 2), (16, 1)],
    keys=[256, 300, 1024],
    dims=[(64, 64), (32, 24), (128, 128)],
    part=[1.0, 0.8],
    size=[1.0, 4.0],
)
def test_steps(scaling, heads, keys, dims, part, size, taken):
    q, k, v = operands(heads, 1, keys, dims=dims)
    is_lone = heads[0] == heads[1]
    check((size * q, k, v), int(part * keys), scaling=scaling)
    if is_lone or scaling == "cosine":
        assert taken[-1]


def test_rows_with_scales(taken):
    q, k, v = operands(rows=3)
    exact, eager = (
        tritonattn.attention(*[x.to(dtype) for x in (q, k, v)], scaling="cosine", backend="reference")
        for dtype in (torch.float64, torch.bfloat16)
    )
    assert_within_bound(tritonattn.attention(q, k, v, scaling="cosine"), exact, eager, torch.bfloat16)
    assert taken == [True]


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_unwritten_keys_reach_nothing(value, taken):
    q, k, v = operands()
    clean = step(q, k, v, 280)
    k[:, :, 280:] = v[:, :, 280:] = value
    assert torch.equal(step(q, k, v, 280), clean)
    assert taken == [True, True]


@pytest.mark.parametrize("value", [torch.nan, torch.inf, 1e30])
def test_large_logits_and_nan_are_left_to_others(value, taken):
    q, k, v = operands()
    clean = step(q, k, v, 300)
    k[0, :, 7] = value
    found = step(q, k, v, 300)
    assert taken == [True, False]
    assert torch.isnan(found[0]).any() == (value != 1e30)
    torch.testing.assert_close(found[1], clean[1], rtol=0.02, atol=0.02)


def lengths(*lengths):
    return {"key_lengths": torch.tensor(lengths)}


OTHERS = {
    "half of a cache": lengths(150, 150),
    "two lengths": lengths(300, 280),
    "a term": {"softcap": 3.0},
    "keys that lie apart": {},
    "few keys": {},
    "several rows": {},
    "a gradient": {},
}


@pytest.mark.parametrize("case", OTHERS)
def test_other_calls(case, taken):
    q, k, v = operands(rows=2 if case == "several rows" else 1, keys=255 if case == "few keys" else 300)
    if case == "keys that lie apart":
        k = k.transpose(1, 2).contiguous().transpose(1, 2)
    if case == "a gradient":
        tritonattn.attention(q.requires_grad_(), k, v)
    else:
        tritonattn.attention_decode(q, k, v, **lengths(*[k.shape[2]] * 2) | OTHERS[case])
    assert taken == [False]


@pytest.mark.parametrize("sizes", [(1, 1, 256), (7, 3, 17), (8, 64, 1000), (33, 128, 300), (2, 512, 64)])
def test_a_second_product_returns_what_the_first_lost(sizes):
    heads, dim, keys = sizes
    random = torch.Generator().manual_seed(0)
    q, k = (torch.randn(heads, n, dim, generator=random).bfloat16() for n in (1, keys))
    product = torch.bmm(q, k.mT)
    lost = torch.baddbmm(product, q, k.mT, beta=-1)
    exact = q.double() @ k.double().mT
    norms = q.double().norm(dim=-1, keepdim=True) * k.double().norm(dim=-1)[:, None]
    assert ((product.double() + lost.double() - exact).abs() / norms).max() < 2**-17
