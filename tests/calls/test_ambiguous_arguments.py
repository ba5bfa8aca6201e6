"""What could be read in two ways, or left out, is refused, and the error says what to write."""

import re

import pytest
import torch

import tritonattn

Q = torch.randn(2, 2, 3, 4)
VISIBLE = torch.tensor([[True, False, False], [True, True, False], [True, True, True]])


def test_masks_of_entries_or_heads():
    """With B equal to Hq, [B, Sq, Sk] would be taken for [Hq, Sq, Sk] in silence."""
    x = VISIBLE.expand(2, 3, 3)
    with pytest.raises(ValueError, match=re.escape("write mask[:, None] for [B, Sq, Sk], mask[None] for [Hq,")):
        tritonattn.attention(Q, Q, Q, mask=x)
    wanted = tritonattn.attention(Q, Q, Q, mask=x[:1, None])
    for spelling in (x[:1], x[0], x[:, None], x[None]):
        torch.testing.assert_close(tritonattn.attention(Q, Q, Q, mask=spelling), wanted)


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
