"""The settings of the SGLang plugin, which need no SGLang; tests/serving/sglang runs the plugin in SGLang."""

from types import SimpleNamespace

import pytest
import torch

from tritonattn.huggingface.settings import CONFIG_MARK, MARK
from tritonattn.integrations.sglang import plugin, settings


def config(saved=None, of_text=None, **entries):
    hf = [SimpleNamespace(tritonattn=one, **entries) for one in (saved, of_text)]
    sizes = {"num_attention_heads": 4, "head_dim": 64, "v_head_dim": 64, "dtype": torch.bfloat16}
    kind = {"attention_arch": SimpleNamespace(name="MHA"), "is_encoder_decoder": False}
    return SimpleNamespace(hf_config=hf[0], hf_text_config=hf[1], **sizes, **kind)


NORMS = {"layers": {"0": {"scaling": "ssmax"}, "1": {"scaling": "key_norm_mean"}}}


@pytest.mark.parametrize(
    ("saved", "given", "message"),
    [
        ({"scaling": "dim"}, {}, None),
        ({"scaling": "dim"}, {"enable_lmcache": True}, None),
        (NORMS, {"enable_lmcache": True}, "enable_lmcache False, got True"),
        (NORMS, {"disaggregation_mode": "decode"}, "disaggregation_mode null, got decode"),
        ({"scaling": "dim"}, {"kv_cache_dtype": "bfloat16"}, None),
        ({"scaling": "dim"}, {"kv_cache_dtype": "fp8_e4m3"}, "kv_cache_dtype auto or bfloat16, got fp8_e4m3"),
        ({"scaling": "dim"}, {"speculative_algorithm": "EAGLE"}, "speculative_algorithm None, got EAGLE"),
        ({"scaling": "dim"}, {"attn_cp_size": 2}, "attn_cp_size 1, got 2"),
        ({"scaling": "dim"}, {"page_size": 24}, "page_size a multiple of 16, got 24"),
    ],
)
def test_a_server_is_refused_by_name(saved, given, message):
    server = SimpleNamespace(**{"page_size": 32, **given})
    if message is None:
        settings.check_server(server, config(saved))
        return
    with pytest.raises(NotImplementedError, match=f"attention_backend tritonattn: expected {message}"):
        settings.check_server(server, config(saved))


def test_learned_values_stay_with_the_config_and_the_mark_stops_models_without_settings():
    def iterate(loader, source, shift=0):
        yield from {"embed": torch.zeros(1), "a.tritonattn.gain": torch.ones(2), MARK: torch.zeros(0)}.items()

    for saved, passed, learned in (
        (NORMS, ["embed"], {"a": ["gain"]}),
        (None, ["embed", "a.tritonattn.gain", MARK], {}),
    ):
        source = SimpleNamespace(model_config=config(saved))
        assert [name for name, _ in settings.take_learned(iterate)(None, source, shift=1)] == passed
        found = settings.learned_values(source.model_config)
        assert {name: list(values) for name, values in found.items()} == learned


@pytest.mark.parametrize(("saved", "left"), [(NORMS, 1280 * 256 // 280), ({"scaling": "dim"}, 1280), (None, 1280)])
def test_records_of_key_norms_have_their_share_of_the_memory(saved, left):
    configurator = SimpleNamespace(model_config=config(saved), kv_cache_dtype=torch.bfloat16)
    assert plugin._beside_norms(lambda configurator, before: 1280)(configurator, 7) == left


def test_the_mark_is_no_quantization(monkeypatch):
    monkeypatch.setattr(plugin, "_prepare_loading", lambda: None)
    parsed = plugin._without_mark(lambda one: getattr(one.hf_config, "compression_config", None))
    other = {"quant_method": "another"}
    assert parsed(config(NORMS, **CONFIG_MARK)) is None
    assert parsed(config(NORMS, compression_config=other)) is other


def test_without_sglang_the_plugin_only_says_so(monkeypatch, caplog):
    monkeypatch.setitem(__import__("sys").modules, "sglang", None)
    monkeypatch.setattr("tritonattn.integrations.serving.versions.version", lambda name: "0.4")
    plugin.register()
    assert "sglang: expected version >=0.5.23,<0.6, got 0.4" in caplog.text
