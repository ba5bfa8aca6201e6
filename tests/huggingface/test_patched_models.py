"""Uses of a patched model (copied, pickled, wrapped, trained, compiled, served), and the formula of its logits."""

import math

import pytest
import torch
import transformers

from tests.huggingface.architectures import ARCHITECTURES
from tests.huggingface.test_patch import LLAMA, logits
from tritonattn.core.visibility import Visibility
from tritonattn.huggingface import patch, patched

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")


# The models' factors of q . k, without scales that are part of q; all others have 1 / sqrt(8).
MODEL_SCALINGS = {"gemma2": 3**-0.5, "gemma3": 3**-0.5, "granite": 0.3, "opt": 1.0, "whisper": 1.0, "t5": 1.0}
RULE_CASES = [
    *(("llama", mode) for mode in ("key_count", "cosine", 0.05, None)),
    *(("gemma2", "key_norm_mean"), ("gemma3", "key_count"), ("granite", None), ("opt", "cosine")),
    *(("whisper", "key_count"), ("whisper", "cosine"), ("bart", "key_norm_mean"), ("gpt2_inverse_layer", None)),
    *(("clip", "cosine"), ("llama4", "key_norm_mean"), ("gpt_oss", "key_count"), ("vit", "key_norm_mean")),
    *(("t5", "key_norm_mean"), ("t5", None)),
]


@pytest.mark.parametrize(
    ("name", "scaling"),
    [(name, mode) for name, mode in RULE_CASES if ARCHITECTURES[name].exists and ARCHITECTURES[name].supported],
)
def test_the_one_rule(name, scaling):
    """logit = model_scaling * sqrt(D) * factor * (q . k) + bias, densely; cosine replaces the model's scaling."""
    architecture, models_scaling = ARCHITECTURES[name], MODEL_SCALINGS.get(name, 8**-0.5)
    network, inputs = architecture.build(), architecture.inputs()
    checked = []

    def compare(module, query, key, arguments, aux):
        scale = models_scaling / (module.layer_idx + 1 if name == "gpt2_inverse_layer" else 1)
        q, k = query.double(), key.double().repeat_interleave(query.shape[1] // key.shape[1], dim=1)
        parts = arguments.keys() & {"causal", "window", "key_ranges", "mask"}
        visible = Visibility.of(query, key, **{part: arguments[part] for part in parts}).dense()
        norms = (k.norm(dim=-1)[:, :, None] * visible).sum(-1, keepdim=True)
        count = visible.sum(-1, keepdim=True)
        dim = q.shape[-1]
        factor = {
            "key_count": scale * math.sqrt(dim) / count,
            "key_norm_mean": scale * math.sqrt(dim) / (norms / count),
            "cosine": math.sqrt(dim) / (q.norm(dim=-1)[..., None] * k.norm(dim=-1)[:, :, None]),
            0.05: scale * math.sqrt(dim) * 0.05,
            None: scale,
        }[scaling]
        bias = arguments.get("bias")
        assert (bias is None) == (name != "t5")
        wanted = ((q @ k.mT) * factor + (0 if bias is None else bias)).masked_fill(~visible, -math.inf).amax(-1)
        torch.testing.assert_close(aux.max_logit.double(), wanted, atol=1e-3, rtol=1e-4)
        checked.append(module)

    with patch(network, scaling=scaling) as one, one.watch(compare):
        architecture.outputs(network, inputs)
    assert len(checked) >= 2


@pytest.mark.parametrize("layers", [None, [1]])
def test_another_model_of_the_same_config_is_left_alone(layers, tmp_path):
    network = LLAMA.build("sdpa")
    other = transformers.LlamaForCausalLM(network.config).eval()
    plain, wanted = logits(network), logits(other)
    first = patch(network, scaling="key_norm_sum", layers=layers)
    assert torch.equal(logits(other), wanted)
    assert other.config._attn_implementation == "sdpa"
    other.save_pretrained(tmp_path / "unpatched")
    second = patch(other, scaling="cosine", layers=layers)
    first.undo()
    second.undo()
    other.save_pretrained(tmp_path / "undone")
    assert network.config is other.config
    assert torch.equal(logits(network), plain)
    for folder in ("unpatched", "undone"):
        again = transformers.LlamaForCausalLM.from_pretrained(tmp_path / folder, attn_implementation="sdpa").eval()
        assert patched(again) is None
        assert torch.equal(logits(again), wanted)


def test_changes_to_a_patched_models_config_stay_after_undo():
    network = ARCHITECTURES["clip"].build()
    config, text = network.config, network.config.text_config
    other = transformers.CLIPModel(config)
    with patch(network, scaling="none"):
        network.config.initializer_factor = 3.0
        network.config.text_config.vocab_size = network.text_model.config.vocab_size + 1
        assert network.text_model.config.vocab_size == 62
        text.attention_dropout = 0.25  # to the original
        assert other.text_model.config.vocab_size == 61
        assert network.text_model.encoder.layers[0].self_attn.tritonattn.shared is network.text_model.config
    assert network.config is config
    assert config.text_config is text
    assert network.text_model.config is text
    assert (config.initializer_factor, text.vocab_size, text.attention_dropout) == (3.0, 62, 0.25)
    assert not hasattr(config, "tritonattn")
