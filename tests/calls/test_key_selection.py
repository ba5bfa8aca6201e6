"""n under key selection: of the selected keys by `mask`, of the visible ones by a bias of -inf."""

import math

import pytest
import torch
import torch.nn.functional as F

from tests.support.snippets import run, snippets
from tritonattn import SCALINGS, attention, attention_decode, key_counts, key_counts_decode, nn

B, HQ, HKV, S, D, KEPT = 2, 4, 2, 12, 8, 4
MODES = {
    "log_key_count": lambda: SCALINGS["log_key_count"](base=5.0),
    "ssmax": lambda: nn.SSMax(HQ, base=5.0, dtype=torch.float64),
}
CAUSAL = torch.ones(S, S).tril().bool()


def selection():
    """q, k, v, and the KEPT keys of the largest score of each row among those it sees: bool [B, 1, S, S]."""
    draw = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(B, heads, S, D, dtype=torch.float64, generator=draw) for heads in (HQ, HKV, HKV))
    scores = torch.randn(B, 1, S, S, generator=draw).masked_fill(~CAUSAL, -torch.inf)
    kept = torch.zeros_like(scores, dtype=torch.bool).scatter(-1, scores.topk(KEPT).indices, True) & CAUSAL
    return q, k, v, kept


def by_hand(q, k, v, kept, n):
    """softmax over the kept keys of ln(n) / ln(5) q . k / sqrt(D)."""
    scaled = q * (n.double().log() / math.log(5.0))[..., None]
    return F.scaled_dot_product_attention(scaled, k, v, attn_mask=kept, enable_gqa=True)


@pytest.mark.parametrize("backend", ["sdpa", "reference"])
@pytest.mark.parametrize("mode", MODES)
def test_the_argument_says_which_n(mode, backend):
    q, k, v, kept = selection()
    options = {"scaling": MODES[mode](), "causal": True, "backend": backend}
    selected, visible = key_counts(q, k, causal=True, mask=kept), key_counts(q, k, causal=True)
    assert selected.flatten().tolist() == [min(i, KEPT) for i in range(1, S + 1)] * B
    assert visible.flatten().tolist() == list(range(1, S + 1))
    of_selected = attention(q, k, v, mask=kept, **options)
    torch.testing.assert_close(of_selected, by_hand(q, k, v, kept, selected), rtol=1e-9, atol=1e-9)
    of_visible = attention(q, k, v, bias=torch.where(kept, 0.0, -torch.inf), **options)
    torch.testing.assert_close(of_visible, by_hand(q, k, v, kept, visible), rtol=1e-9, atol=1e-9)
    assert (of_selected - of_visible).abs().max() > 1e-2


def test_a_factor_of_the_visible_keys_beside_a_mask():
    q, k, v, kept = selection()
    factor = key_counts(q, k, causal=True).double().log() / math.log(5.0) / D**0.5
    ours = attention(q, k, v, scaling=factor, causal=True, mask=kept)
    wanted = attention(q, k, v, scaling=MODES["ssmax"](), causal=True, bias=torch.where(kept, 0.0, -torch.inf))
    torch.testing.assert_close(ours, wanted, rtol=1e-9, atol=1e-9)


@torch.no_grad()
@pytest.mark.parametrize("mode", MODES)
def test_steps(mode):
    """The last row, from a cache: its kept keys gathered, or marked by a bias of each key."""
    q, k, v, kept = selection()
    last, scaling = kept[:, 0, -1], MODES[mode]()  # [B, S]
    index = last.nonzero()[:, 1].view(B, 1, KEPT, 1).expand(B, HKV, KEPT, D)
    step, lengths = q[:, :, -1:], torch.full((B,), S)
    gathered = attention_decode(
        step, k.gather(2, index), v.gather(2, index), key_lengths=torch.full((B,), KEPT), scaling=scaling
    )
    whole = attention(q, k, v, mask=kept, scaling=scaling, causal=True)
    torch.testing.assert_close(gathered, whole[:, :, -1:], rtol=1e-9, atol=1e-9)

    bias = torch.where(last, 0.0, -torch.inf).double()[:, None]  # [B, 1, S]
    marked = attention_decode(step, k, v, key_lengths=lengths, scaling=scaling, key_bias=bias.expand(B, HKV, S))
    whole = attention(q, k, v, bias=torch.where(kept, 0.0, -torch.inf), scaling=scaling, causal=True)
    torch.testing.assert_close(marked, whole[:, :, -1:], rtol=1e-9, atol=1e-9)
    assert key_counts_decode(step, key_lengths=lengths).flatten().tolist() == [S] * B


def test_mistral_large4_counts_the_visible_keys():
    """Its layer multiplies q by s ln(position + 1) + b, and selects keys after that."""
    modeling = pytest.importorskip("transformers.models.mistral_large4.modeling_mistral_large4")
    factor = modeling.MistralLarge4TextSoftmaxScaling(HQ).double()
    with torch.no_grad():
        factor.scale.normal_()
        factor.bias.normal_()
    q, k, v, kept = selection()
    scaled = factor(q, torch.arange(S)[None], head_dim_first=True)
    wanted = F.scaled_dot_product_attention(scaled, k, v, attn_mask=kept, enable_gqa=True)
    scaling = nn.SSMax(HQ, bias=True, base=5.0, dtype=torch.float64)
    scaling.load_state_dict({"s": factor.scale, "b": factor.bias})
    ours = attention(q, k, v, scaling=scaling, causal=True, bias=torch.where(kept, 0.0, -torch.inf))
    torch.testing.assert_close(ours, wanted, rtol=1e-5, atol=1e-5)  # it takes ln in float32


def test_the_page_shows_both():
    page = "docs/concepts.md"
    (position,) = (i for i, code in enumerate(snippets(page)) if "mask=selected" in code)
    found = run(page, position)
    assert found["of_selected"].shape == found["of_visible"].shape
    assert (found["of_selected"] - found["of_visible"]).abs().max() > 1e-3
