"""Each recipe of docs/recipes.md against its formula in plain PyTorch, in float64, with gradients."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from tests.support.snippets import run, snippets
from tritonattn.nn import LearnedCosine, PerHead, SSMax

PAGE = "docs/recipes.md"
B, H, HKV, S, D = 2, 4, 2, 23, 8
CAUSAL = torch.ones(S, S).tril().bool()


def recipe(name):
    (position,) = (i for i, code in enumerate(snippets(PAGE)) if f"def {name}(" in code)
    return run(PAGE, position)[name]


def normal(*shape):
    return torch.randn(*shape, dtype=torch.float64, requires_grad=True)


def inputs(dim_of_v=D):
    return normal(B, H, S, D), normal(B, HKV, S, D), normal(B, HKV, S, dim_of_v)


def softmax(logits, v, visible=CAUSAL):
    v = v.repeat_interleave(logits.shape[1] // v.shape[1], 1)
    return logits.masked_fill(~visible, -torch.inf).softmax(-1) @ v


def products(q, k):
    return q @ k.repeat_interleave(q.shape[1] // k.shape[1], 1).mT


def same(ours, wanted, leaves):
    torch.testing.assert_close(ours, wanted, rtol=1e-9, atol=1e-9)
    weights = torch.randn_like(wanted)
    gradients = [torch.autograd.grad((x * weights).sum(), leaves) for x in (ours, wanted)]
    torch.testing.assert_close(*gradients, rtol=1e-7, atol=1e-9)


def test_gated_outputs():
    x, (q, k, v), gate = normal(B, S, 6), inputs(), nn.Linear(6, H * D, dtype=torch.float64)
    ours = recipe("gated_attention")(x, q, k, v, gate, causal=True)
    sigmoid = 1 / (1 + torch.exp(-(x @ gate.weight.T + gate.bias))).view(B, S, H, D)
    wanted = softmax(products(q, k) / math.sqrt(D), v).transpose(1, 2) * sigmoid
    same(ours, wanted.reshape(B, S, H * D), [x, q, k, v, gate.weight, gate.bias])


def test_differential_attention():
    q, k, v, lambdas = normal(B, 2 * H, S, D), normal(B, 2 * HKV, S, D), normal(B, HKV, S, 2 * D), normal(4, D)
    ours = recipe("differential_attention")(q, k, v, lambdas, 0.6, causal=True)
    weight = (lambdas[0] * lambdas[1]).sum().exp() - (lambdas[2] * lambdas[3]).sum().exp() + 0.6
    first, second = (
        softmax(products(q[:, h : h + H], k[:, g : g + HKV]) / math.sqrt(D), v) for h, g in ((0, 0), (H, HKV))
    )
    out = first - weight * second
    wanted = 0.4 * out / (out.square().mean(-1, keepdim=True) + 1e-5).sqrt()
    same(ours, wanted, [q, k, v, lambdas])


@pytest.mark.parametrize(("factor", "mscale"), [(4.0, 1.0), (40.0, 0.707), (1.0, 1.0), (0.5, 1.0)])
def test_yarn_s_attention_factor(factor, mscale):
    q, k, v = inputs()
    deepseek = pytest.importorskip("transformers.models.mistral_large4.modeling_mistral_large4")
    m = deepseek.yarn_get_mscale(factor, mscale)
    ours = recipe("qk_norm_attention")(
        q, k, v, scaling="sqrt_dim", gain=recipe("yarn_gain")(factor, mscale), causal=True
    )
    same(ours, softmax(products(m * q, m * k) / math.sqrt(D), v), [q, k, v])


def test_qk_norm_with_a_learned_temperature():
    (q, k, v), scaling = inputs(), LearnedCosine(heads=H, tau=10, dtype=torch.float64)
    nn.init.normal_(scaling.theta)
    tau = 10 * scaling.theta.exp()[:, None, None]
    wanted = softmax(tau * products(F.normalize(q, dim=-1), F.normalize(k, dim=-1)), v)
    same(recipe("qk_norm_attention")(q, k, v, scaling=scaling, causal=True), wanted, [q, k, v, scaling.theta])


def test_qk_norm_with_weights():
    (q, k, v), (a, b) = inputs(), (normal(D), normal(D))
    scaling = PerHead(heads=H, dtype=torch.float64)
    nn.init.normal_(scaling.theta)
    unit_q, unit_k = (x / (x.square().mean(-1, keepdim=True) + torch.finfo(x.dtype).eps).sqrt() for x in (q, k))
    wanted = softmax(scaling.theta.exp()[:, None, None] / math.sqrt(D) * products(unit_q * a, unit_k * b), v)
    ours = recipe("qk_rms_norm_attention")(q, k, v, a, b, scaling=scaling, causal=True)
    same(ours, wanted, [q, k, v, a, b, scaling.theta])


def turned(x, position):
    """Rotary embedding of x [..., D] at positions that broadcast to [...], by sines and cosines."""
    angle = position[..., None] * 100.0 ** (-torch.arange(D // 2, dtype=torch.float64) / (D // 2))
    a, b = x[..., 0::2], x[..., 1::2]
    return torch.stack([a * angle.cos() - b * angle.sin(), a * angle.sin() + b * angle.cos()], -1).flatten(-2)


@pytest.mark.parametrize(("chunk", "limit"), [(5, 7), (5, 20), (8, 9), (40, 50)])
def test_dual_chunk_attention(chunk, limit):
    q, k, v = inputs()
    ours = recipe("dual_chunk_attention")(q, k, v, turned, chunk, limit)
    row, key = torch.arange(S)[:, None], torch.arange(S)
    apart = row // chunk - key // chunk
    position = torch.where(apart == 1, (row % chunk + chunk).clamp(max=limit), min(2 * chunk - 1, limit))
    position = torch.where(apart == 0, row % chunk, position)  # of the query in each pair, [S, S]
    pairs = turned(q[:, :, :, None], position), turned(k, key % chunk).repeat_interleave(H // HKV, 1)[:, :, None]
    same(ours, softmax((pairs[0] * pairs[1]).sum(-1) / math.sqrt(D), v), [q, k, v])


@pytest.mark.parametrize("form", ["mla_expanded", "mla_absorbed"])
def test_mla_with_ssmax(form):
    rank, rope, dim_of_v = 12, 4, 6
    q, latent, k_rope = normal(B, H, S, D + rope), normal(B, S, rank), normal(B, S, rope)
    w_k, w_v, scaling = normal(H, D, rank), normal(H, dim_of_v, rank), SSMax(heads=H, bias=True, dtype=torch.float64)
    nn.init.normal_(scaling.s)
    nn.init.normal_(scaling.b)
    of_k, of_v = (latent[:, None] @ weight.mT for weight in (w_k, w_v))
    z = q[..., :D] @ of_k.mT + q[..., D:] @ k_rope[:, None].mT
    factor = scaling.s[:, None] * torch.arange(1.0, S + 1, dtype=torch.float64).log() + scaling.b[:, None]
    wanted = softmax(factor[..., None] * z / math.sqrt(D + rope), of_v)
    ours = recipe(form)(q, latent, k_rope, w_k, w_v, scaling, causal=True)
    same(ours, wanted, [q, latent, k_rope, w_k, w_v, scaling.s, scaling.b])
