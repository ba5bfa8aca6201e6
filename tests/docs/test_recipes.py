"""Recipes of docs/recipes.md, and an entropy floor, against formulas in plain PyTorch, in float64, with gradients."""

import math
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from tests.support.snippets import run, snippets
from tritonattn import attention
from tritonattn.nn import LearnedCosine, PerHead, SSMax

PAGE = "docs/recipes.md"
B, H, HKV, S, D = 2, 4, 2, 23, 8
CAUSAL = torch.ones(S, S).tril().bool()


def recipe(name, page=PAGE):
    (position,) = (i for i, code in enumerate(snippets(page)) if f"def {name}(" in code)
    return run(page, position)[name]


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


def test_the_layers_of_the_recipe_are_those_of_train_gpt():
    """Window, rotary base, heads and trained length."""
    layers, program = run(PAGE, 0)["layers"], Path("docs/examples/train_gpt.py").read_text(encoding="utf-8")
    near, far = layers
    assert f"Block(window={near.window!r}, rotary={near.rotary!r}), Block(scaling=scaling)" in program
    assert (
        f"VALUES, WIDTH, HEADS, LENGTH, STEPS = 1024, 32, {near.width}, {near.heads}, {far.scaling.base:g}, " in program
    )


@pytest.mark.filterwarnings("error")
def test_the_loop_of_the_recipe_moves_its_schedule_to_the_end():
    (position,) = (i for i, code in enumerate(snippets(PAGE)) if "nn.Scheduled(" in code)
    assert run(PAGE, position)["scaling"].progress() == 1


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
    m = 0.1 * mscale * math.log(factor) + 1 if factor > 1 else 1.0  # DeepSeek's yarn_get_mscale
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


DOCUMENTS = torch.tensor([[0] * 9 + [1] * 14, [0] * 4 + [3] * 16 + [-1] * 3])
BLOCKS = {
    "prefixes": torch.tensor([[0] * 5 + [-1] * 4 + [1] + [-1] * 13, [-1] * 4 + [0] * 16 + [-1] * 3]),
    "images": torch.tensor([[-1, 0, 0, 1, 1, 1] + [-1] * 5 + [0] * 8 + [-1] * 4, [4] * 3 + [-1] * 15 + [5] * 5]),
    "chunks": torch.arange(S).expand(B, -1) // 6,
}


@pytest.mark.parametrize("kind", BLOCKS)
def test_prefixes_images_and_chunks(kind):
    """Under the factor 1 / n, which counts the keys that the formula lets a row see."""
    q, k, v = inputs()
    position, blocks = torch.arange(S), BLOCKS[kind]
    run = (blocks != blocks.roll(1, -1)).cumsum(-1)
    together = (run[:, :, None] == run[:, None]) & (blocks >= 0)[:, None]
    of_document = (DOCUMENTS[:, :, None] == DOCUMENTS[:, None]) & (DOCUMENTS >= 0)[:, None]
    chunked = of_document & CAUSAL & (position[:, None] // 6 == position // 6)
    for visible, ranges, causal in (
        (of_document & (CAUSAL | together), recipe("block_ranges")(DOCUMENTS, blocks), False),
        (chunked, recipe("chunk_ranges")(DOCUMENTS, 6), True),
    ):
        ours = attention(q, k, v, scaling="key_count", key_ranges=ranges, causal=causal)
        visible = visible[:, None]
        logits = products(q, k) / visible.sum(-1, keepdim=True).clamp(min=1)
        padding = ~visible.any(-1, keepdim=True)
        wanted = softmax(logits, v, visible | padding).masked_fill(padding, 0)
        same(ours, wanted, [q, k, v])


@pytest.mark.parametrize("bidirectional", [True, False])
def test_t5_s_relative_positions(bidirectional):
    t5 = pytest.importorskip("transformers.models.t5.modeling_t5")
    config = t5.T5Config(num_heads=H, d_kv=D, is_decoder=not bidirectional)
    layer = t5.T5Attention(config, has_relative_attention_bias=True, layer_idx=0).double()
    table, keys = layer.relative_attention_bias.weight, 200
    nn.init.normal_(table)
    q, k, v = normal(1, H, 3, D), normal(1, H, keys, D), normal(1, H, keys, D)  # the last rows, as in decoding
    arguments = {"scaling": 1.0, "causal": not bidirectional, **recipe("t5_bias")(table, keys, bidirectional)}
    bias = layer.compute_bias(3, keys, past_seen_tokens=keys - 3)
    visible = True if bidirectional else torch.ones(3, keys).tril(keys - 3).bool()
    wanted = softmax(q @ k.mT + bias, v, torch.as_tensor(visible))
    same(attention(q, k, v, **arguments), wanted, [q, k, v, table])


def test_swin_s_relative_positions():
    swin = pytest.importorskip("timm.models.swin_transformer")
    layer = swin.WindowAttention(H * D, H, window_size=3).double()
    table = layer.relative_position_bias_table
    nn.init.normal_(table)
    q, k, v = normal(B, H, 9, D), normal(B, H, 9, D), normal(B, H, 9, D)
    ours = attention(q, k, v, bias=recipe("swin_bias")(table, 3))
    wanted = softmax(q @ k.mT / math.sqrt(D) + layer._get_rel_pos_bias(), v, torch.tensor(True))
    same(ours, wanted, [q, k, v, table])


@pytest.mark.parametrize("layer_type", ["hybrid", "hybrid_sliding"])
def test_relative_positions_from_the_hidden_state(layer_type):
    inkling = pytest.importorskip("transformers.models.inkling.modeling_inkling")
    sizes = {"num_attention_heads": H, "num_key_value_heads": HKV, "head_dim": D}
    config = inkling.InklingTextConfig(
        hidden_size=24,
        num_hidden_layers=1,
        layer_types=[layer_type],
        sliding_window_size=6,
        d_rel=5,
        rel_extent=9,
        log_scaling_n_floor=4,
        attn_implementation="eager",
        **sizes,
        **{f"swa_{name}": size for name, size in sizes.items()},
    )
    layer, x = inkling.InklingAttention(config, 0), torch.randn(B, S, 24, requires_grad=True)
    nn.init.normal_(layer.rel_logits_proj.proj)
    window = None if layer_type == "hybrid" else (5, 0)
    visible = CAUSAL if window is None else CAUSAL & ~torch.ones(S, S).tril(-6).bool()
    mask = torch.zeros(S, S).masked_fill(~visible, -torch.inf)[None, None]
    wanted, _ = layer(x, mask)
    projected = layer.q_proj(x), layer.k_sconv(layer.k_proj(x)), layer.v_sconv(layer.v_proj(x))
    q, k, v = (y.unflatten(-1, (-1, D)) for y in projected)
    q, k, v = (y.transpose(1, 2) for y in (layer.q_norm(q), layer.k_norm(k), v))
    r, tau = layer.r_proj(x).unflatten(-1, (H, -1)), 1.0
    if window is None:
        tau = 1 + config.log_scaling_alpha * (torch.arange(1, S + 1) / 4).clamp(min=1).log()
    out = recipe("relative_attention")(q, k, v, r, layer.rel_logits_proj.proj, tau, window=window)
    ours = layer.o_proj(out.transpose(1, 2).flatten(2))
    torch.testing.assert_close(ours, wanted, rtol=1e-4, atol=1e-5)
    leaves = [x, *layer.parameters()]
    gradients = [torch.autograd.grad(y.square().sum(), leaves) for y in (ours, wanted)]
    torch.testing.assert_close(*gradients, rtol=1e-3, atol=1e-5)


def test_an_entropy_floor_holds_where_the_control_collapses():
    trained = recipe("trained", "docs/monitoring.md")
    (_, collapsed), (_, held) = trained(0.0), trained(1.0)
    assert collapsed < 0.05
    assert held > 0.3


def test_the_entropy_floor_is_the_formula():
    q, k, v = inputs()
    logits = (products(q, k) / D**0.5).masked_fill(~CAUSAL, -torch.inf)
    p = logits.softmax(-1)
    wanted = F.relu(0.9 * torch.arange(1, S + 1).log() + (p * torch.where(p > 0, p, 1).log()).sum(-1)).mean()
    _, aux = attention(q, k, v, causal=True, return_aux=True)
    same(recipe("entropy_floor", "docs/monitoring.md")(aux, 0.9), wanted, (q, k))
