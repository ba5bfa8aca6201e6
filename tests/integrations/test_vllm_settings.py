"""The settings of the vLLM plugin, which need no vLLM; tests/serving runs the plugin in vLLM."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from tritonattn.huggingface.settings import MARK, Settings
from tritonattn.integrations.vllm import settings

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


def test_layers_are_found_by_the_ends_of_their_names():
    name, own = settings.layer_settings({"scaling": "dim"}, LAYERS[1], LAYERS, 4)
    assert (name, own.scaling.name) == (None, "dim")
    saved = {"layers": {"language_model.layers.1.self_attn": {"scaling": "ssmax", "gain": 2.0}}}
    name, own = settings.layer_settings(saved, LAYERS[1], LAYERS, 4)
    assert (name, own.scaling.s.shape, own.gain) == ("language_model.layers.1.self_attn", (4,), 2.0)
    name, own = settings.layer_settings(saved, LAYERS[0], LAYERS, 4)
    assert (name, own.scaling, own.gain) == (None, None, None)
    for names in (["model.layers.7.self_attn"], ["self_attn"], [LAYERS[0][:-5], f"x.{LAYERS[0][:-5]}"]):
        with pytest.raises(ValueError, match=rf"layers\['{names[-1]}'\]: expected the name of one attention layer"):
            settings.layer_settings({"layers": {key: {"scaling": "dim"} for key in names}}, LAYERS[0], LAYERS, 4)


@pytest.mark.parametrize("takes", [True, False])
def test_a_loader_hands_learned_values_to_the_layers_alone(takes):
    class Loader:
        def get_all_weights(self, config, model):
            yield from weights.items()

    weights = {"embed": torch.zeros(1), "a.tritonattn.scaling.s": torch.ones(4), "a.tritonattn.gain": torch.ones(2)}
    weights |= {"b.tritonattn.gain": torch.zeros(2), MARK: torch.zeros(0)}
    model = nn.Sequential(nn.Identity(), nn.Identity())
    if takes:
        model[1].impl = SimpleNamespace(learned=None)
    settings.take_learned(Loader)
    settings.take_learned(Loader)
    passed = [name for name, _ in Loader().get_all_weights(None, model)]
    assert passed == (["embed"] if takes else [name for name in weights if name != MARK])
    if takes:
        assert {name: list(own) for name, own in model[1].impl.learned.items()} == {
            "a": ["scaling.s", "gain"],
            "b": ["gain"],
        }
        assert model[1].impl.learned["a"]["gain"] is not weights["a.tritonattn.gain"]  # a loader may reuse its memory


def test_each_rank_takes_the_values_of_its_heads():
    def saved():
        return Settings.from_config({"scaling": {"name": "ssmax", "bias": True}, "gain": {"learned": [4, 1]}}, 4)

    learned = {"scaling.s": torch.arange(4.0), "scaling.b": -torch.arange(4.0), "gain": torch.arange(4.0)[:, None]}
    own = settings.with_learned(saved(), "layer", learned, rank=1, ranks=2)
    assert own.scaling.s.tolist() == [2, 3]
    assert own.scaling.b.tolist() == [-2, -3]
    assert own.gain.tolist() == [[2], [3]]
    assert not any(x.requires_grad for x in (own.gain, *own.scaling.parameters()))
    for wrong in ({}, {**learned, "gain": torch.ones(2, 1)}):
        with pytest.raises(ValueError, match=r"layer.tritonattn: expected weights \{.*'gain': \[4, 1\].*got"):
            settings.with_learned(saved(), "layer", wrong, rank=0, ranks=1)
