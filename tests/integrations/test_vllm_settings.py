"""The settings of the vLLM plugin, which need no vLLM; tests/serving runs the plugin in vLLM."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn
from transformers import AttentionInterface, LlamaConfig, LlamaModel

from tritonattn import PagedKeyStatistics, attention_decode
from tritonattn.huggingface import patched
from tritonattn.huggingface.settings import MARK, Settings
from tritonattn.integrations.serving import settings as serving
from tritonattn.integrations.vllm import pages, settings

LAYERS = ("model.layers.0.self_attn.attn", "model.layers.1.self_attn.attn")


def config(asked=None, saved=None, of_text=None):
    hf = [SimpleNamespace(tritonattn=one) for one in (saved, of_text)]
    return SimpleNamespace(additional_config=asked, model_config=SimpleNamespace(hf_config=hf[0], hf_text_config=hf[1]))


def test_settings_asked_for_come_before_those_of_the_checkpoint():
    asked, saved, of_text = ({"scaling": name} for name in ("dim", "none", "key_count"))
    assert settings.saved_settings(config({"tritonattn": asked}, saved, of_text)) is asked
    assert settings.saved_settings(config({}, saved, of_text)) is saved
    assert settings.saved_settings(config(object(), None, of_text)) is of_text
    assert settings.saved_settings(config()) is None
    assert settings.saved_settings(SimpleNamespace(additional_config={}, model_config=None)) is None
    assert settings.saved_settings(config({"tritonattn": {}}, saved)) == {}
    assert settings.saved_settings(config(saved={})) is None  # so that a marked checkpoint is refused


def test_layers_are_found_by_the_ends_of_their_names():
    name, found = serving.layer_settings({"scaling": "dim"}, LAYERS[1], LAYERS, 4)
    assert (name, found.scaling.name) == (None, "dim")
    saved = {"layers": {"language_model.layers.1.self_attn": {"scaling": "ssmax", "gain": 2.0}}}
    name, found = serving.layer_settings(saved, LAYERS[1], LAYERS, 4)
    assert (name, found.scaling.s.shape, found.gain) == ("language_model.layers.1.self_attn", (4,), 2.0)
    name, found = serving.layer_settings(saved, LAYERS[0], LAYERS, 4)
    assert (name, found.scaling, found.gain) == (None, None, None)
    for names in (["model.layers.7.self_attn"], ["self_attn"], [LAYERS[0][:-5], f"x.{LAYERS[0][:-5]}"]):
        with pytest.raises(ValueError, match=rf"layers\['{names[-1]}'\]: expected the name of one attention layer"):
            serving.layer_settings({"layers": {key: {"scaling": "dim"} for key in names}}, LAYERS[0], LAYERS, 4)


@pytest.mark.parametrize("takes", [True, False])
@pytest.mark.parametrize("saved", [{"layers": {}}, None])
def test_a_loader_hands_learned_values_to_the_layers_alone(takes, saved):
    class Loader:
        def get_all_weights(self, config, model):
            yield from weights.items()

    weights = {"embed": torch.zeros(1), "a.tritonattn.scaling.s": torch.ones(4), "a.tritonattn.gain": torch.ones(2)}
    weights |= {"b.tritonattn.gain": torch.zeros(2), MARK: torch.zeros(0)}
    model = nn.Sequential(nn.Identity(), nn.Identity())
    if takes:
        model[1].impl = SimpleNamespace(learned=None, saved=saved)
    settings.take_learned(Loader)
    settings.take_learned(Loader)
    passed = [name for name, _ in Loader().get_all_weights(None, model)]
    refused = [] if takes and saved else [MARK]  # by the model, which does not know it
    assert passed == (["embed", *refused] if takes else list(weights))
    if takes:
        assert {name: list(found) for name, found in model[1].impl.learned.items()} == {
            "a": ["scaling.s", "gain"],
            "b": ["gain"],
        }
        assert model[1].impl.learned["a"]["gain"] is not weights["a.tritonattn.gain"]  # a loader may reuse its memory


def test_layers_share_a_factor_only_where_all_of_it_is_equal():
    def shared(**given):
        return serving.LayerFactor.of(serving.Settings.from_config(given), 0.125, (4, 2), 64).shared

    assert shared(scaling="log_key_count:512") == shared(scaling={"name": "log_key_count", "base": 512})
    assert shared(scaling="log_key_count", gain=0.5) == shared(scaling="log_key_count", gain=0.5)
    different = [shared(scaling="log_key_count", gain=gain) for gain in (None, 0.5, 1.5)]
    different += [shared(scaling={"name": "log_key_count", "base": 512.0}), shared(scaling="key_count")]
    assert len(set(different)) == 5
    assert None not in different
    assert shared(scaling="key_norm_mean") is None


def test_each_rank_takes_the_values_of_its_heads():
    def saved():
        return Settings.from_config({"scaling": {"name": "ssmax", "bias": True}, "gain": {"learned": [4, 1]}}, 4)

    learned = {"scaling.s": torch.arange(4.0), "scaling.b": -torch.arange(4.0), "gain": torch.arange(4.0)[:, None]}
    found = serving.with_learned(saved(), "layer", learned, rank=1, ranks=2)
    assert found.scaling.s.tolist() == [2, 3]
    assert found.scaling.b.tolist() == [-2, -3]
    assert found.gain.tolist() == [[2], [3]]
    assert not any(x.requires_grad for x in (found.gain, *found.scaling.parameters()))
    assert serving.with_learned(saved(), "layer", None, rank=1, ranks=2).scaling.s.tolist() == [1, 1]
    for wrong in ({}, {**learned, "gain": torch.ones(2, 1)}):
        with pytest.raises(ValueError, match=r"layer.tritonattn: expected weights \{.*'gain': \[4, 1\].*got"):
            serving.with_learned(saved(), "layer", wrong, rank=0, ranks=1)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_cache_holds_keys_values_and_norms_of_keys(dtype):
    page, keys, heads, head_dim = 16, 21, 2, 6
    k, v = torch.randn(2, keys, heads, head_dim).to(dtype)
    table = torch.tensor([[3, 1]], dtype=torch.int32)
    arguments = {"key_lengths": torch.tensor([keys]), "block_table": table}
    found = PagedKeyStatistics(pages=4, page=page, kv_heads=heads)
    cache = torch.full((4, heads, page, 2 * head_dim + pages.RECORD), torch.nan, dtype=dtype)
    for order in ("as it is", "keys before heads"):
        cache = cache if order == "as it is" else cache.transpose(1, 2).contiguous().transpose(1, 2)
        inside = pages.key_statistics(cache, head_dim)
        for record in (found, inside):
            record.append(k, torch.tensor([0, keys], dtype=torch.int32), **arguments)
        cells = table[0, torch.arange(keys) // page], torch.arange(keys) % page
        for held, x in zip(pages.keys_and_values(cache, head_dim), (k, v), strict=True):
            held[cells] = x
        for x, other in zip(pages.key_statistics(cache, head_dim).buffers, found.buffers, strict=True):
            assert torch.equal(x[cells], other[cells])
        q = torch.randn(1, 4, 1, head_dim, dtype=dtype)
        options = {**arguments, "scaling": "key_norm_mean"}
        held = pages.keys_and_values(cache, head_dim)
        out = attention_decode(q, *held, statistics=inside, **options)
        torch.testing.assert_close(out, attention_decode(q, *held, **options))


def test_a_model_of_transformers_that_vllm_builds_keeps_vllms_attention():
    config = LlamaConfig(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, vocab_size=8)
    config.tritonattn = {"layers": {"layers.0.self_attn": {"scaling": "dim"}}}
    AttentionInterface.register("vllm", lambda *_: None)
    try:
        built = {name: LlamaModel._from_config(config, attn_implementation=name) for name in ("vllm", "eager")}
    finally:
        AttentionInterface._global_mapping.pop("vllm")
    assert {name: patched(model) is None for name, model in built.items()} == {"vllm": True, "eager": False}
