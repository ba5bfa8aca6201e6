"""The rows of docs/scalings.md on models that scale by ln n, each against its model's formula, with gradients."""

import math
import re

import pytest
import torch
import torch.nn.functional as F

from tests.support.snippets import ROOT, run, snippets
from tritonattn import SCALINGS, attention, attention_varlen, check_scaling, document_ranges, key_counts, nn

PAGE = "docs/scalings.md"
B, H, HKV, S, D = 2, 4, 2, 23, 8
ELSEWHERE = {"Mistral Large 4", "Inkling"}  # tests/scaling/test_values.py, against transformers' modules
DOCUMENTS = torch.tensor([[0] * 9 + [1] * 14, [0] * 3 + [1] * 4 + [2] * 16])


@pytest.fixture(scope="module")
def page():
    """The names of the page's code of models."""
    (position,) = (i for i, code in enumerate(snippets(PAGE)) if "class BoundedSSMax" in code)
    return run(PAGE, position)


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def operands():
    return tuple(torch.randn(B, heads, S, D, dtype=torch.float64, requires_grad=True) for heads in (H, HKV, HKV))


def learned(parameter):
    with torch.no_grad():
        parameter.copy_(torch.linspace(-0.5, 1.5, parameter.numel()).view_as(parameter))
    return parameter


def ssmax(name="ssmax_scale"):
    """SSMax with the parameter of a model's state dict."""
    scaling = nn.SSMax(heads=H, base=math.e, dtype=torch.float64)
    scaling.load_state_dict({"s": {name: torch.linspace(-0.5, 1.5, H)}[name]})
    return scaling


def softmax(q, k, v, scale=D**-0.5, visible=None, is_causal=False):
    return F.scaled_dot_product_attention(q, k, v, visible, is_causal=is_causal, scale=scale, enable_gqa=True)


def same(ours, theirs, leaves):
    torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9)
    weight = torch.randn_like(theirs)
    gradients = [torch.autograd.grad((x * weight).sum(), leaves, retain_graph=True) for x in (ours, theirs)]
    torch.testing.assert_close(*gradients, rtol=1e-7, atol=1e-9)


# ---- What the models' code computes


def olmo(q, ssmax_scale, cu_doc_lens=None):
    """`Attention._apply_scalable_softmax` of OLMo-core, of q [B, T, H, D]."""
    if cu_doc_lens is None:
        visible_lengths = torch.arange(1, q.shape[1] + 1).expand(q.shape[0], -1)
    else:
        token = torch.arange(q.shape[0] * q.shape[1])
        document = torch.searchsorted(cu_doc_lens[1:], token, right=True)
        visible_lengths = (token - cu_doc_lens[document] + 1).view(q.shape[0], q.shape[1])
    scale = visible_lengths.double().log()[..., None] * ssmax_scale.view(1, 1, -1)
    return q * scale[..., None]


def limix(q, weight, bias, n):
    """`SoftmaxScalingMLP.forward` of LimiX-2, its bounds 0.5 and 5, of q [B, S, H, D]."""
    soft = (0.5 / 2) * torch.tanh((2 / 0.5) * weight) + (0.5 + 0) / 2  # [H, 1]
    logn_scale = (soft * math.log(n)).squeeze() + 1.0
    bias_scale = (5.0 / 2) * torch.tanh(bias * 2 / 5.0) + 5.0 / 2
    return q * (logn_scale * bias_scale).reshape(1, 1, -1, 1)


def tabular(q, n, base_mlp, query_mlp):
    """`SoftmaxScalingMLP.forward` of TabPFN 3.5, and QASSMaxMLP of TabICLv2, of q [B, H, S, D] and n keys."""
    base = base_mlp(torch.tensor([[math.log(max(n, 1))]], dtype=q.dtype)).view(1, H, 1, D)
    return q * (base * (1 + torch.tanh(query_mlp(q))))


def uniception(q, n, growth=None, base_count=444):
    """`Attention.forward` of UniCeption: use_scalable_softmax, or with a growth factor use_entropy_scaling."""
    return q * (math.log(n) if growth is None else math.sqrt(growth * math.log(n) / math.log(base_count)))


# ---- The rows


def olmo_hybrids(page):
    """One document a row, several in rows of one length, and packed."""
    q, k, v = operands()
    scaling = ssmax()
    theirs = softmax(olmo(q.transpose(1, 2), scaling.s).transpose(1, 2), k, v, is_causal=True)
    same(attention(q, k, v, scaling=scaling, causal=True), theirs, (q, k, v, scaling.s))

    ends = torch.tensor([0, 9, 23, 26, 30, 46], dtype=torch.int32)
    scaled = olmo(q.transpose(1, 2), scaling.s, ends).transpose(1, 2)
    together = (DOCUMENTS[:, :, None] == DOCUMENTS[:, None])[:, None] & torch.ones(S, S).tril().bool()
    theirs = softmax(scaled, k, v, visible=together)
    ours = attention(q, k, v, scaling=scaling, causal=True, key_ranges=document_ranges(DOCUMENTS))
    same(ours, theirs, (q, k, v, scaling.s))
    packed = (x.transpose(1, 2).flatten(0, 1) for x in (q, k, v))
    ours = attention_varlen(*packed, ends, ends, 16, 16, scaling=scaling, causal=True)
    same(ours, theirs.transpose(1, 2).flatten(0, 1), (q, k, v, scaling.s))


def step5(page):
    """The port's scale s ln n, which stands in place of 1 / sqrt(D)."""
    q, k, v = operands()
    scaling = ssmax("ssmax_s")
    scale = scaling.s[:, None] * torch.arange(1, S + 1).double().log()
    theirs = softmax(q * scale[..., None], k, v, scale=1.0, is_causal=True)
    same(attention(q, k, v, scaling=scaling, gain=D**0.5, causal=True), theirs, (q, k, v, scaling.s))


def limix2(page):
    q, k, v = operands()
    scaling = page["BoundedSSMax"](H).double()
    weight, bias = map(learned, scaling.parameters())
    theirs = softmax(limix(q.transpose(1, 2), weight, bias, S).transpose(1, 2), k, v)
    same(attention(q, k, v, scaling=scaling), theirs, (q, k, v, weight, bias))
    lengths = torch.tensor([S, 5])  # padding does not count
    ours = attention(q, k, v, scaling=scaling, key_lengths=lengths)[1:]
    scaled = limix(q[1:].transpose(1, 2), weight, bias, 5).transpose(1, 2)
    same(ours, softmax(scaled, k[1:, :, :5], v[1:, :, :5]), (q, k, v, weight, bias))
    assert max(check_scaling(scaling, heads=H).values()) < 1e-6


def tabpfn_and_tabicl(page):
    """Rows of a table attend to the training rows: n is their number."""
    q, k, v = operands()
    base_mlp, query_mlp = (
        torch.nn.Sequential(torch.nn.Linear(size, 16), torch.nn.GELU(), torch.nn.Linear(16, out)).double()
        for size, out in ((1, H * D), (D, D))
    )
    k, v = k[:, :, :11], v[:, :, :11]
    theirs = softmax(tabular(q, 11, base_mlp, query_mlp), k, v)
    ours = attention(page["scaled_query"](q, key_counts(q, k), base_mlp, query_mlp), k, v)
    same(ours, theirs, (q, k, v, *base_mlp.parameters(), *query_mlp.parameters()))


def scalable_softmax(page):
    q, k, v = operands()
    scaling = SCALINGS["log_key_count"](math.e)
    same(attention(q, k, v, scaling=scaling), softmax(uniception(q, S), k, v), (q, k, v))
    k, v = k[:, :, :7], v[:, :, :7]  # CrossAttention takes the logarithm of the queries' number
    ours = attention(q, k, v, scaling=math.log(S) * D**-0.5)
    same(ours, softmax(uniception(q, S), k, v), (q, k, v))


def entropy_scaling(page):
    q, k, v = operands()
    ours = attention(q, k, v, scaling="log_power:444", gain=1.4**0.5)
    same(ours, softmax(uniception(q, S, growth=1.4), k, v), (q, k, v))


ROWS = {
    "OLMo 3.5 hybrids": olmo_hybrids,
    "Step-5-Preview": step5,
    "LimiX-2": limix2,
    "TabPFN 3.5; TabICLv2": tabpfn_and_tabicl,
    "UniCeption (MapAnything), `use_scalable_softmax`": scalable_softmax,
    "UniCeption, `use_entropy_scaling`": entropy_scaling,
}


@pytest.mark.parametrize("name", ROWS)
def test_a_row_is_its_models_formula(name, page):
    ROWS[name](page)


def test_each_row_has_a_test_and_a_source():
    text = (ROOT / PAGE).read_text(encoding="utf-8")
    section = text.split("## Models that scale by ln n\n")[1].split("\n## ")[0]
    rows = [line.strip("|").split(" | ") for line in section.splitlines() if line.startswith("| ")][1:]
    names = {re.sub(r" \(an open pull request\)$", "", row[0].strip()) for row in rows}
    assert names == set(ROWS) | ELSEWHERE
    for row in rows:
        assert re.search(r"@[0-9a-f]{8}|transformers 5\.\d+", row[1]), row[0]
