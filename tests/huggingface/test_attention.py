"""Models of transformers give with "tritonattn" what they give with their own eager attention."""

from __future__ import annotations

import math
from types import SimpleNamespace

import pytest
import torch
import transformers
from torch import nn

import tritonattn
from tritonattn.huggingface import Settings, attention_forward, call_arguments, register, unregister

# Weights of size 1: with the usual 0.02 attention is uniform, and no wrong scaling would show.
SMALL = {
    "vocab_size": 61,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "initializer_range": 1.0,
    "pad_token_id": 0,
}
CONFIGS = {
    "llama": lambda: transformers.LlamaConfig(**SMALL),
    "mistral": lambda: transformers.MistralConfig(**SMALL, sliding_window=5),
    "qwen3": lambda: transformers.Qwen3Config(**SMALL, head_dim=8),
    "gemma2": lambda: transformers.Gemma2Config(
        **SMALL, head_dim=8, query_pre_attn_scalar=3, sliding_window=5, attn_logit_softcapping=2.0
    ),
    "gpt_oss": lambda: transformers.GptOssConfig(
        **SMALL, head_dim=8, sliding_window=5, num_local_experts=2, num_experts_per_tok=1
    ),
    "gpt2": lambda: transformers.GPT2Config(
        vocab_size=61, n_embd=32, n_layer=2, n_head=4, n_positions=64, initializer_range=1.0, pad_token_id=0
    ),
}
PADDINGS = {"none": None, "left": [[0, 0, 0] + [1] * 10, [1] * 13], "right": [[1] * 9 + [0] * 4, [1] * 13],
            "holes": [[1, 1, 0, 1, 0, 0] + [1] * 7, [1] * 13]}  # fmt: skip


@pytest.fixture(autouse=True)
def _registered():
    register()
    yield
    unregister()


def model(name: str):
    torch.manual_seed(0)
    network = transformers.AutoModelForCausalLM.from_config(
        CONFIGS[name](), attn_implementation="eager"
    ).eval()
    for module in network.modules():
        if isinstance(getattr(module, "sinks", None), nn.Parameter):
            nn.init.normal_(module.sinks)
    return network


def tokens(batch: int = 2, length: int = 13) -> torch.Tensor:
    return torch.randint(1, 61, (batch, length), generator=torch.Generator().manual_seed(1))


def logits(network, implementation: str, **inputs) -> torch.Tensor:
    network.set_attn_implementation(implementation)
    with torch.no_grad():
        return network(**inputs).logits


@pytest.mark.parametrize("padding", PADDINGS)
@pytest.mark.parametrize("name", CONFIGS)
def test_forward_equals_eager(name, padding):
    network, inputs = model(name), {"input_ids": tokens()}
    seen = torch.ones(2, 13, dtype=torch.bool)
    if PADDINGS[padding] is not None:
        inputs["attention_mask"] = torch.tensor(PADDINGS[padding])
        seen = inputs["attention_mask"].bool()
    wanted = logits(network, "eager", **inputs)[seen]
    got = logits(network, "tritonattn", **inputs)[seen]
    torch.testing.assert_close(got, wanted, atol=2e-4, rtol=2e-4)


def test_a_wrong_scaling_would_show():
    network, inputs = model("llama"), {"input_ids": tokens()}
    wanted = logits(network, "eager", **inputs)
    network.config.tritonattn = {"gain": 1.1}
    assert not torch.allclose(logits(network, "tritonattn", **inputs), wanted, atol=1e-2, rtol=1e-2)


def test_packed_documents_equal_separate_ones():
    network, ids = model("llama"), tokens(1, 13)
    position = torch.tensor([[*range(5), *range(8)]])
    packed = logits(network, "tritonattn", input_ids=ids, position_ids=position, use_cache=False)
    parts = [logits(network, "tritonattn", input_ids=part) for part in ids.split([5, 8], dim=1)]
    torch.testing.assert_close(packed, torch.cat(parts, dim=1), atol=2e-4, rtol=2e-4)


@pytest.mark.parametrize("cache", ["dynamic", "static"])
@pytest.mark.parametrize("name", ["llama", "mistral", "gemma2"])
@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")
def test_generation_equals_eager(name, cache):
    network = model(name)
    inputs = {"input_ids": tokens(), "attention_mask": torch.tensor(PADDINGS["left"])}
    texts = []
    for implementation in ("eager", "tritonattn"):
        network.set_attn_implementation(implementation)
        options = {"cache_implementation": "static", "disable_compile": True} if cache == "static" else {}
        texts.append(network.generate(**inputs, max_new_tokens=9, do_sample=False, pad_token_id=0, **options))
    assert torch.equal(*texts)


def test_gradients_equal_eager():
    network, ids = model("llama"), tokens()
    found = []
    for implementation in ("eager", "tritonattn"):
        network.set_attn_implementation(implementation)
        network.zero_grad()
        network(input_ids=ids, labels=ids, use_cache=False).loss.backward()
        found.append([parameter.grad.clone() for parameter in network.parameters()])
    for wanted, got in zip(*found, strict=True):
        assert (got - wanted).norm() <= 1e-4 * wanted.norm()


def test_the_configs_scaling_replaces_the_models():
    module = SimpleNamespace(
        config=SimpleNamespace(tritonattn={"scaling": "key_norm_mean", "gain": 2.0}), is_causal=True
    )
    q, k, v = torch.randn(3, 1, 2, 7, 8)
    out, weights = attention_forward(module, q, k, v, None, scaling=0.3)
    wanted = tritonattn.attention(q, k, v, scaling="key_norm_mean", gain=2.0, causal=True)
    assert weights is None
    torch.testing.assert_close(out, wanted.transpose(1, 2))


def test_the_scaling_reaches_every_layer_and_is_saved_with_the_config(tmp_path):
    network, ids = model("llama"), tokens()
    own = logits(network, "tritonattn", input_ids=ids)
    network.config.tritonattn = {"scaling": "none"}
    changed = logits(network, "tritonattn", input_ids=ids)
    assert not torch.allclose(own, changed, atol=1e-2)
    network.config.save_pretrained(tmp_path)
    assert transformers.AutoConfig.from_pretrained(tmp_path).tritonattn == {"scaling": "none"}


def test_a_query_scaled_beforehand_is_not_scaled_twice():
    """Whisper multiplies the query by module.scaling and then passes scaling=1."""
    q, k, v = torch.randn(3, 1, 2, 7, 16)
    module = SimpleNamespace(
        scaling=0.25, is_causal=False, config=SimpleNamespace(tritonattn={"scaling": "sqrt_dim"})
    )
    out, _ = attention_forward(module, q * 0.25, k, v, None, scaling=1.0)
    torch.testing.assert_close(out, tritonattn.attention(q, k, v).transpose(1, 2))


def test_an_unexplained_scaling_of_one_warns():
    module = SimpleNamespace(is_causal=False, config=SimpleNamespace(tritonattn={"scaling": "dim"}))
    q = torch.randn(1, 2, 3, 4)
    with pytest.warns(UserWarning, match=r"scaling=1\.0"):
        attention_forward(module, q, q, q, None, scaling=1.0)


def test_no_scaling_means_one_over_the_root_of_the_dimension():
    q = torch.randn(1, 2, 3, 16)
    arguments = call_arguments(SimpleNamespace(is_causal=True), q, q, None)
    assert arguments["scaling"] == "sqrt_dim"
    assert math.isclose(call_arguments(SimpleNamespace(), q, q, None, scaling=0.5)["scaling"], 0.5)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("position_bias", torch.zeros(1, 2, 3, 3)),
        ("indices", torch.zeros(1)),
        ("block_indices", torch.zeros(1)),
        ("sinks", torch.zeros(2)),
        ("head_mask", torch.ones(2)),
        ("output_attentions", True),
    ],
)
def test_what_cannot_be_honoured_is_refused_by_name(name, value):
    q = torch.randn(1, 2, 3, 4)
    module = SimpleNamespace(is_causal=True)
    with pytest.raises(NotImplementedError, match=name):
        attention_forward(module, q, q, q, None, scaling=0.5, **{name: value})
    attention_forward(module, q, q, q, None, scaling=0.5, **{name: None})


@pytest.mark.parametrize(
    ("mask", "message"),
    [
        (torch.ones(1, 3), "4-D"),
        ("a block mask", "str"),
        (torch.zeros(1, 1, 3, 1, dtype=torch.int32), r"\[B, 1, Q, 2\]"),
    ],
)
def test_a_foreign_mask_is_refused(mask, message):
    q = torch.randn(1, 2, 3, 4)
    with pytest.raises(ValueError, match=rf"attention_mask.*{message}"):
        attention_forward(SimpleNamespace(), q, q, q, mask, scaling=0.5)


def test_additive_masks_of_zero_and_minus_infinity_are_bool_masks():
    q, module = torch.randn(1, 2, 3, 4), SimpleNamespace()
    visible = torch.ones(1, 1, 3, 3, dtype=torch.bool).tril()
    wanted = attention_forward(module, q, q, q, visible, scaling=0.5)[0]
    for low in (-torch.inf, torch.finfo(q.dtype).min):
        additive = torch.zeros(1, 1, 3, 3).masked_fill(~visible, low)
        torch.testing.assert_close(attention_forward(module, q, q, q, additive, scaling=0.5)[0], wanted)
    with pytest.raises(NotImplementedError, match="attention_mask: a bias"):
        attention_forward(module, q, q, q, torch.full((1, 1, 3, 3), -1.5), scaling=0.5)


@pytest.mark.parametrize("causal", [True, False])
def test_packed_lengths_without_a_mask(causal):
    q, k, v = torch.randn(3, 1, 2, 9, 4)
    ends = torch.tensor([0, 4, 4, 9], dtype=torch.int32)
    out, _ = attention_forward(
        SimpleNamespace(),
        q,
        k,
        v,
        None,
        scaling=0.5,
        is_causal=causal,
        cu_seq_lens_q=ends,
        cu_seq_lens_k=ends,
    )
    parts = [
        tritonattn.attention(*(x[:, :, rows] for x in (q, k, v)), scaling=0.5, causal=causal)
        for rows in (slice(0, 4), slice(4, 9))
    ]
    torch.testing.assert_close(out, torch.cat(parts, dim=2).transpose(1, 2))


def test_a_window_without_a_mask():
    q, k, v = torch.randn(3, 1, 2, 9, 4)
    module = SimpleNamespace(is_causal=True)
    out, _ = attention_forward(module, q, k, v, None, scaling=0.5, sliding_window=3)
    wanted = tritonattn.attention(q, k, v, scaling=0.5, causal=True, window=(2, None))
    torch.testing.assert_close(out, wanted.transpose(1, 2))
    wide, _ = attention_forward(module, q, k, v, None, scaling=0.5, sliding_window=9)
    torch.testing.assert_close(wide, tritonattn.attention(q, k, v, scaling=0.5, causal=True).transpose(1, 2))
    with pytest.raises(NotImplementedError, match="sliding_window"):
        attention_forward(module, q, k, v, None, scaling=0.5, sliding_window=3, is_causal=False)


def test_settings_refuse_what_they_do_not_know():
    module = SimpleNamespace(config=SimpleNamespace(tritonattn={"scalling": "dim"}))
    with pytest.raises(ValueError, match="scalling"):
        Settings.of(module)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")
@pytest.mark.parametrize("name", ["llama", "mistral"])
def test_compiled_model_equals_eager(name):
    network, ids = model(name), tokens()
    mask = torch.tensor(PADDINGS["left"])
    wanted = logits(network, "eager", input_ids=ids, attention_mask=mask, use_cache=False)
    network.set_attn_implementation("tritonattn")
    compiled = torch.compile(network, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        got = compiled(input_ids=ids, attention_mask=mask, use_cache=False).logits
    torch.testing.assert_close(got[mask.bool()], wanted[mask.bool()], atol=2e-4, rtol=2e-4)
