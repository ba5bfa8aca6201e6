"""`qk_clip`: the logits of each head get one factor, and those of no other head do."""

import math
import warnings
from contextlib import contextmanager

import pytest
import torch
import transformers
from torch import nn

from tests.analysis.models import Net
from tests.support.llama import llama
from tests.support.refusals import refuses
from tritonattn import SCALINGS
from tritonattn.analysis import Alarm, Monitor, Thresholds, qk_clip
from tritonattn.huggingface import patch
from tritonattn.huggingface.architecture import interface_keywords
from tritonattn.integrations.torch_modules import MultiheadAttention
from tritonattn.nn import QueryAdaptiveSSMax, ScaledAttention

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")
QUIET = Thresholds(None, None, None)
SIZES = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
SIZES |= {"vocab_size": 61, "max_position_embeddings": 64, "initializer_range": 0.5}


def largest(net, run) -> dict[str, list[float]]:
    """The largest logit of every head, by layer."""
    with Monitor(net, every=1, thresholds=QUIET) as monitor:
        run(net)
        return {name: layer["max_logit"] for name, layer in monitor.step()["layers"].items()}


def clipped(net, run):
    """Clip the first layer to a threshold between its heads' logits, and check every head's new logits."""
    before = largest(net, run)
    layer = next(iter(before))
    ordered = sorted(before[layer])
    threshold = (ordered[1] + ordered[2]) / 2  # between the heads
    assert threshold > 0
    found = qk_clip(net, threshold).clip({layer: before[layer]})
    gamma = [min(1.0, threshold / one) if one > 0 else 1.0 for one in before[layer]]
    torch.testing.assert_close(found[layer], torch.tensor(gamma, dtype=torch.float64))
    after = largest(net, run)[layer]
    for old, new, factor in zip(before[layer], after, gamma, strict=True):
        assert new == pytest.approx(old * factor, rel=1e-4), (before[layer], after, gamma)


@pytest.mark.parametrize("kv_heads", [4, 2, 1])
@pytest.mark.parametrize("scaling", ["sqrt_dim", "key_norm_mean", "key_norm_max", "log_key_count", "ssmax", 0.3])
def test_scaled_attention(scaling, kv_heads):
    x = torch.randn(2, 9, 32, generator=torch.Generator().manual_seed(0))
    net = Net(kv_heads=kv_heads, scaling=scaling, causal=True)
    key = net.attention.k_proj.weight.detach().clone()
    clipped(net, lambda net: net(x))
    alone = kv_heads == 4 and not str(scaling).startswith("key_norm")
    assert torch.equal(key, net.attention.k_proj.weight) is not alone


MODELS = {
    "llama": lambda: llama("sdpa", initializer_range=0.5, attention_bias=True),
    "phi3": lambda: transformers.Phi3ForCausalLM(
        transformers.Phi3Config(**SIZES, num_key_value_heads=2, pad_token_id=0, eos_token_id=1)
    ),
    "gpt2": lambda: transformers.GPT2LMHeadModel(
        transformers.GPT2Config(n_embd=32, n_head=4, n_layer=2, vocab_size=61, n_positions=64, initializer_range=0.5)
    ),
    "bert": lambda: transformers.BertModel(transformers.BertConfig(**SIZES)),
}
TOKENS = torch.randint(1, 61, (2, 9), generator=torch.Generator().manual_seed(1))


def build(name: str):
    torch.manual_seed(0)
    model = MODELS[name]()
    for parameter_name, parameter in model.named_parameters():
        if parameter_name.endswith("bias"):
            nn.init.normal_(parameter, std=0.5)
    return model.train()


@pytest.mark.parametrize("name", [*MODELS, "patched", "patched in the other layer"])
def test_layouts_of_transformers(name):
    model = build(name if name in MODELS else "llama")
    if name not in MODELS:
        patch(model, "key_norm_mean", layers=None if name == "patched" else [1])
    if not any(interface_keywords(type(module)) is not None for module in model.modules()):
        pytest.skip("in this version its attention does not go through AttentionInterface")
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    clipped(model, lambda model: model(TOKENS))


def latent(q_lora_rank: int | None):
    """A DeepSeek V3 of 4 heads with 4 features a head and 6 of a shared key."""
    torch.manual_seed(0)
    dims = {"qk_rope_head_dim": 6, "qk_nope_head_dim": 4, "v_head_dim": 8, "kv_lora_rank": 8}
    dims |= {"q_lora_rank": q_lora_rank, "num_key_value_heads": 4}
    config = transformers.DeepseekV3Config(**SIZES, **dims, first_k_dense_replace=2)
    return transformers.DeepseekV3ForCausalLM(config).train()


@pytest.mark.parametrize("q_lora_rank", [8, None])
@pytest.mark.parametrize("scaling", [None, "key_norm_sum"])
def test_latent_attention_by_the_rule_of_kimi_k2(q_lora_rank, scaling):
    model = latent(q_lora_rank)
    if scaling is not None:
        patch(model, scaling, gain=20.0)
    clipped(model, lambda model: model(TOKENS))


def test_a_layer_that_is_the_root():
    x = torch.randn(2, 9, 32, generator=torch.Generator().manual_seed(0))
    clipped(Net(kv_heads=4).attention, lambda net: net(x))
    torch.manual_seed(0)
    whole = MultiheadAttention(32, 4, batch_first=True)
    clipped(whole, lambda net: net(4 * x, 4 * x, x, need_weights=False))
    alone = build("llama").model.layers[0].self_attn
    before = alone.q_proj.weight.detach().clone()
    alarm = Alarm(0, "LlamaAttention", "max_logit", 8.0, 4.0, (8.0, 1.0, 1.0, 1.0))
    assert qk_clip(alone, 4.0)([alarm])["LlamaAttention"].tolist() == [0.5, 1.0, 1.0, 1.0]
    assert not torch.equal(alone.q_proj.weight[:8], before[:8])
    assert torch.equal(alone.q_proj.weight[8:], before[8:])


@contextmanager
def unchanged(net):
    before = {name: x.clone() for name, x in net.state_dict().items()}
    yield
    assert all(torch.equal(x, before[name]) for name, x in net.state_dict().items())


def refused(net, layer, match, heads=4):
    with unchanged(net), pytest.raises(NotImplementedError, match=match):
        qk_clip(net, 1.0).clip({layer: [2.0] * heads})


def test_others_are_refused_by_name():
    for mode in (name for name, cls in SCALINGS.items() if "‖q‖" in cls.about.factor):
        refused(Net(scaling=mode), "attention", f"scaling {mode}")
    fresh = QueryAdaptiveSSMax(heads=4, head_dim=8)  # its weight of q is 0
    refused(Net(scaling=fresh), "attention", "scaling query_adaptive_ssmax")
    refused(nn.ModuleDict({"a": nn.Linear(3, 3), "b": Net()}), "a", "layout of Linear")
    adapted = type("LoraLinear", (nn.Linear,), {})(32, 32)  # what it adds is not in its weight
    quantised = nn.Linear(32, 32)
    quantised.weight = nn.Parameter(torch.ones(32, 32, dtype=torch.int8), requires_grad=False)
    for projection, message in (
        (nn.Sequential(nn.Linear(32, 32)), "plain linear layer as q_proj, got Sequential"),
        (adapted, "plain linear layer as q_proj, got LoraLinear"),
        (quantised, "floating weights in q_proj, got torch.int8"),
        (nn.Linear(32, 64), "expected 32 outputs of q_proj, got 64"),  # gated
    ):
        net = Net()
        net.attention.q_proj = projection
        refused(net, "attention", message)
    refused(Net(qk_norm=True), "attention", r"attention: .* norm of q and k, got q_norm \(RMSNorm\)")
    qwen = transformers.Qwen3ForCausalLM(transformers.Qwen3Config(**SIZES, num_key_value_heads=2, head_dim=8))
    refused(qwen, "model.layers.1.self_attn", r"layers\.1\.self_attn: .* q_norm")
    root = ScaledAttention(64, heads=4, scaling=QueryAdaptiveSSMax(heads=4, head_dim=16))
    refuses("NotImplementedError: scaling query_adaptive_ssmax: its logits are not proportional to q", qk_clip, root)


def test_layers_that_cannot_be_clipped_are_named_at_once_and_left_in_a_run():
    net, x = nn.Sequential(Net(qk_norm=True), Net(scaling="none")), torch.randn(2, 9, 32)
    with pytest.warns(
        UserWarning, match=r"these layers will not be clipped: 0\.attention: QK-clip does nothing .*norm"
    ):
        clip = qk_clip(net, 1.0)
    assert clip.skipped.keys() == {"0.attention"}
    before = {name: x.clone() for name, x in net.state_dict().items()}
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="qk_clip")
        warnings.filterwarnings("ignore", category=RuntimeWarning)
        with Monitor(net, every=1, thresholds=Thresholds(0.5, None, None), on_alarm=clip) as monitor:
            net(x).sum().backward()
            alarms = monitor.step()["alarms"]
    assert {alarm["layer"] for alarm in alarms} == {"0.attention", "1.attention"}
    changed = {name for name, x in net.state_dict().items() if not torch.equal(x, before[name])}
    assert changed == {"1.attention.q_proj.weight", "1.attention.q_proj.bias"}


def test_infinite_logits_leave_a_head_and_arguments_are_checked():
    net = Net()
    with unchanged(net):
        assert qk_clip(net, 10.0).clip({"attention": [math.inf, -math.inf, math.nan, None]}) == {}
        assert qk_clip(net, 10.0).clip({"attention": [10.0, -3.0, None, math.nan]}) == {}
        assert qk_clip(net, 10.0)([]) == {}
    for logit in (20.0, 1.0):
        message = "ValueError: max_logits: expected names of layers, got 'attentions'"
        refuses(message, qk_clip(net, 10.0).clip, {"attentions": [logit] * 4})
    for threshold in (0, -1.0, math.nan, "100", True):
        refuses("ValueError: threshold: expected a positive number", qk_clip, net, threshold)
    refuses("TypeError: model: expected a torch.nn.Module, got NoneType", qk_clip, None)
    refuses("ValueError: ~ expected 4 largest logits, got 3", qk_clip(net, 1.0).clip, {"attention": [2.0] * 3})
