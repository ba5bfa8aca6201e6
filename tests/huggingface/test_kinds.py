"""Kinds of layers by what they do: the keys that they show, and positions in their keys."""

import pytest
import torch

from tests.huggingface.architectures import _LAYERED, ARCHITECTURES, Architecture, _decoder
from tests.support.refusals import refuses
from tritonattn.huggingface import patch
from tritonattn.huggingface.architecture import attention_modules
from tritonattn.huggingface.kinds import has_positions, is_global, of_kind, window_size
from tritonattn.huggingface.masks import visibility_of
from tritonattn.nn import LearnedLogPower, PerHead, SSMax
from tritonattn.scaling import LogKeyCount

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")
SHOWN = "llama mistral qwen2_window gemma2 gemma3 phi3 gpt_oss llama4 beam zaya smollm3 gpt2 whisper t5 inkling".split()
_ROTARY_IN_WINDOWS = {**_LAYERED, "layer_types": ["full_attention", "sliding_attention"]}
_FIRST = {
    "llama": ARCHITECTURES["llama"],
    "gpt_neox": ARCHITECTURES["gpt_neox"],
    "gemma3": ARCHITECTURES["gemma3"],
    "llama4": Architecture(
        "Llama4ForCausalLM",
        "Llama4TextConfig",
        {**ARCHITECTURES["llama4"].arguments, "no_rope_layers": [0, 1], "attn_temperature_tuning": False},
    ),
    "smollm3": _decoder("SmolLM3", use_sliding_window=False, no_rope_layers=[0, 1]),
    "cohere2": _decoder("Cohere2", **_ROTARY_IN_WINDOWS),
    "exaone4": _decoder("Exaone4", **_ROTARY_IN_WINDOWS, sliding_window_pattern=2),
    "exaone4 without windows": _decoder("Exaone4", sliding_window=None, layer_types=["full_attention"] * 2),
    "beam": Architecture(
        "BeamForCausalLM", "BeamConfig", {**ARCHITECTURES["beam"].arguments, **_ROTARY_IN_WINDOWS}
    ),
    "granite_swa": _decoder("GraniteSWA", **_ROTARY_IN_WINDOWS, layer_rope_theta=[0, 10000.0]),
}  # fmt: skip


def built(architecture):
    if not (architecture.exists and architecture.supported):
        pytest.skip("this transformers has no such model")
    return architecture.build()


@torch.no_grad()
def calls(network, inputs):
    """The query, key and arguments of each patched layer's call, by the layer's name."""
    seen = {}
    names = {id(module): name for name, module in network.named_modules()}

    def observe(module, query, key, arguments, aux):
        seen[names[id(module)]] = query, key, arguments

    with patch(network, scaling=None) as one, one.watch(observe):
        network(**inputs)
    return seen


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("name", SHOWN)
def test_a_layer_is_global_if_its_last_row_attends_to_all_keys(name):
    network = built(ARCHITECTURES[name])
    found = {one.name: one for one in attention_modules(network)}
    inputs = ARCHITECTURES[name].inputs("none")
    for layer, (query, key, arguments) in calls(network, inputs).items():
        counts = visibility_of(query, key, arguments).counts()
        widest = int(counts.max())
        assert is_global(found[layer]) == (int(counts[..., -1].min()) == key.shape[2])
        assert window_size(found[layer]) == (None if is_global(found[layer]) else widest)


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("name", _FIRST)
def test_a_layer_is_without_positions_if_its_keys_do_not_follow_them(name):
    network = built(_FIRST[name])
    first = attention_modules(network)[0]
    tokens = _FIRST[name].inputs("none")["input_ids"]
    positions = torch.arange(tokens.shape[1])[None]
    keys = [calls(network, {"input_ids": tokens, "position_ids": p})[first.name][1] for p in (positions, positions * 3)]
    assert has_positions(first) == (not torch.equal(*keys))


def test_a_kind_that_no_layer_has_or_that_nothing_says_is_refused():
    llama, gpt2 = ARCHITECTURES["llama"].build(), ARCHITECTURES["gpt2"].build()
    refuses(
        "ValueError: layers: ~ 'without positions', got 2 others (LlamaAttention)",
        patch,
        llama,
        layers="without positions",
    )
    refuses(
        "ValueError: layers: ~ says which layers are 'without positions' ~ GPT2Attention in transformer.h.0.attn",
        patch,
        gpt2,
        layers="without positions",
    )
    llama.config.sliding_window = 5  # which Llama's code does not read
    refuses("ValueError: layers: ~ 'global' ~ LlamaAttention", of_kind, "global", attention_modules(llama))
    refuses("ValueError: layers: expected ~ 'global', 'without positions' or None", patch, llama, layers="globl")


LONG = [LogKeyCount(64), SSMax(4, base=64), LearnedLogPower(4, base=64), PerHead(LogKeyCount(64), heads=4)]


@pytest.mark.parametrize("scaling", LONG, ids=str)
def test_a_window_below_the_base_keeps_sqrt_dim(scaling):
    network = ARCHITECTURES["gemma3"].build()
    with pytest.warns(UserWarning, match=r"scaling: .* got model.layers.0.self_attn \(base 64, window 5\): n would"):
        one = patch(network, scaling=scaling)
    first, second = (layer.scaling for layer in one.layers.values())
    assert first.name == "sqrt_dim"
    assert type(second) is type(scaling)


@pytest.mark.filterwarnings("error::UserWarning")
@pytest.mark.parametrize(
    ("scaling", "layers"),
    [
        (LogKeyCount(64), "global"),
        (LogKeyCount(5), None),
        ("ssmax", None),
        (SSMax(4, mode="sqrt_dim"), None),
        ("qwen_logn", None),
    ],
    ids=str,
)
def test_other_layers_and_bases_are_as_asked(scaling, layers):
    with patch(ARCHITECTURES["gemma3"].build(), scaling=scaling, layers=layers) as one:
        assert "sqrt_dim" not in {getattr(layer.scaling, "name", "") for layer in one.layers.values()}
