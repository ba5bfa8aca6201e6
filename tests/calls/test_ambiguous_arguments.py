"""What could be read in two ways, or left out, is refused, and the error says what to write."""

import re

import pytest
import torch

import tritonattn

Q = torch.randn(2, 2, 3, 4)
VISIBLE = torch.tensor([[True, False, False], [True, True, False], [True, True, True]])


@pytest.mark.parametrize(("name", "x"), [("mask", VISIBLE.expand(2, 3, 3)), ("bias", torch.zeros(2, 3, 3))])
def test_pairs_of_entries_or_heads(name, x):
    """With B equal to Hq, [B, Sq, Sk] would be taken for [Hq, Sq, Sk] in silence."""
    with pytest.raises(ValueError, match=re.escape(f"write {name}[:, None] for [B, Sq, Sk], {name}[None] for [Hq,")):
        tritonattn.attention(Q, Q, Q, **{name: x})
    wanted = tritonattn.attention(Q, Q, Q, **{name: x[:1, None]})
    for spelling in (x[:1], x[0], x[:, None], x[None]):
        torch.testing.assert_close(tritonattn.attention(Q, Q, Q, **{name: spelling}), wanted)


@pytest.mark.parametrize("shape", [(2, 3, 2), (2, 1, 3, 2)])
def test_a_range_that_ends_before_it_begins(shape):
    ranges = torch.tensor([[0, 1], [2, 2], [0, 3]]).expand(2, 3, 2).clone()
    assert tritonattn.attention(Q, Q, Q, key_ranges=ranges.view(shape))[:, :, 1].eq(0).all()
    ranges[1, 2] = torch.tensor([3, 1])
    with pytest.raises(ValueError, match=r"key_ranges: expected lo <= hi, got \[3, 1\] at row 2 of batch entry 1"):
        tritonattn.attention(Q, Q, Q, key_ranges=ranges.view(shape))


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: tritonattn.attention(Q, Q, Q, sm_scale=1.0), "expected scaling= .*, got sm_scale="),
        (lambda: tritonattn.attention(Q, Q, Q, need_weights=True), "expected return_aux= .*, got need_weights="),
        (lambda: tritonattn.attention_varlen(Q, Q, Q, 0, 0, 1, 1, mask=VISIBLE), "expected cu_seqlens_k= .*got mask="),
        (lambda: tritonattn.attention_decode(Q, Q, Q), r"attention_decode: expected key_lengths= \(\[B\]: .*got none"),
        (lambda: tritonattn.nn.ScaledAttention(4, 1)(Q[0], causal=True), "expected causal= in the constructor"),
    ],
)
def test_words_of_other_libraries(call, words):
    with pytest.raises(TypeError, match=words):
        call()


def test_the_cosine_of_numbers_has_no_gradient():
    """As `Cosine` says of D = 1."""
    q, k = (torch.randn(1, 2, 5, 1, dtype=torch.float64, requires_grad=True) for _ in range(2))
    out = tritonattn.attention(q, k, Q.new_ones(1, 2, 5, 3).double().cumsum(2), scaling="cosine")
    gradients = torch.autograd.grad(out.square().sum(), (q, k))
    assert all(gradient.abs().max() < 1e-12 for gradient in gradients)
