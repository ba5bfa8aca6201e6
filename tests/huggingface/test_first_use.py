"""An import changes no class of transformers or PEFT; the first model that is built, patched or unpickled does."""

import json
import pickle
import subprocess
import sys

import pytest
import torch
import transformers
from torch import nn

from tests.huggingface.test_patch import LLAMA
from tests.huggingface.test_saving import without_tritonattn
from tritonattn.huggingface import first_use, patch, register
from tritonattn.huggingface.loading import follow_saved_settings

# In a process of its own; the argument is a folder with a saved patched model.
PROGRAM = """
import json, peft, sys
from transformers import AutoModelForCausalLM, PreTrainedModel, LlamaForCausalLM
from transformers.generation.continuous_batching import ContinuousBatchingManager

CLASSES = *LlamaForCausalLM.__mro__, ContinuousBatchingManager, peft.PeftModel
before = {one: dict(vars(one)) for one in CLASSES}
import tritonattn.huggingface
after = {one: dict(vars(one)) for one in CLASSES}
pairs = [(one, name) for one in CLASSES for name in {*before[one], *after[one]}]
names = [name for one, name in pairs if before[one].get(name) is not after[one].get(name)]
model = AutoModelForCausalLM.from_pretrained(sys.argv[1])
layers = tritonattn.huggingface.patched(model).layers.values()
refuses = hasattr(peft.PeftModel.load_adapter, "__wrapped__")
print(json.dumps([names, [own.scaling.name for own in layers], refuses]))
"""


def test_an_import_changes_no_class_and_a_saved_patch_loads_after_it(tmp_path):
    pytest.importorskip("peft")
    network = LLAMA.build()
    patch(network, scaling="key_norm_mean")
    network.save_pretrained(tmp_path)
    command = [sys.executable, "-W", "ignore", "-c", PROGRAM, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == [[], ["key_norm_mean"] * 2, True]


@pytest.fixture
def uses(monkeypatch) -> list[str]:
    """Filled at the first use from now on."""
    found: list[str] = []
    monkeypatch.setattr(first_use, "_waiting", [lambda: found.append("used")])
    return found


def test_a_model_that_is_built_is_a_use(uses):
    assert uses == []
    LLAMA.build()
    LLAMA.build()
    assert uses == ["used"]


def test_a_model_that_is_wrapped_is_a_use(uses):
    first_use._waiting.clear()
    network = LLAMA.build()
    first_use._waiting.append(lambda: uses.append("wrapped"))
    nn.Sequential(network)
    assert uses == ["wrapped"]


def test_imports_at_the_first_use_make_no_tensor_on_meta(monkeypatch):
    devices: list[str] = []
    monkeypatch.setattr(first_use, "_waiting", [lambda: devices.append(torch.tensor(1).device.type)])
    with torch.device("meta"):  # as from_pretrained builds
        LLAMA.build()
    assert devices == ["cpu"]


def test_a_model_that_lives_at_the_import_is_refused_early(monkeypatch):
    monkeypatch.setattr(first_use, "_waiting", [])
    monkeypatch.setattr(first_use, "register_module_module_registration_hook", lambda hook: None)
    config = transformers.BloomConfig(hidden_size=8, n_layer=1, n_head=2, vocab_size=9)
    with without_tritonattn():
        network = transformers.BloomForCausalLM(config)
        register()
        first_use.at_first_use(follow_saved_settings)
        with pytest.raises(NotImplementedError, match="BloomAttention"):
            network.set_attn_implementation("tritonattn")


def test_a_model_that_was_built_before_is_used_once_it_is_patched_or_unpickled(uses):
    first_use._waiting.clear()
    network = LLAMA.build()
    first_use._waiting.append(lambda: uses.append("patched"))
    patch(network, scaling="key_count")
    assert uses == ["patched"]
    first_use._waiting.append(lambda: uses.append("unpickled"))
    pickle.loads(pickle.dumps(network))
    assert uses == ["patched", "unpickled"]


def test_masks_of_a_model_that_was_built_before_are_explicit(uses):
    """Its class may lack the flags by which layers do without masks."""
    first_use._waiting.clear()
    network, tokens = LLAMA.build(), torch.arange(5)[None]
    network.set_attn_implementation("tritonattn")
    masks: list[object] = []
    network.model.layers[0].register_forward_pre_hook(
        lambda layer, inputs, named: masks.append(named["attention_mask"]), with_kwargs=True
    )
    expected = network(tokens).logits
    first_use._waiting.append(lambda: uses.append("used"))
    torch.testing.assert_close(network(tokens).logits, expected)
    assert masks[0] is None
    assert isinstance(masks[1], torch.Tensor)


def test_masks_of_a_model_that_was_built_before_stay_explicit_where_its_class_has_no_sdpa(monkeypatch):
    """The flags of its layers may be wrong; nobody noted that it chose this implementation."""
    network = LLAMA.build()
    network.set_attn_implementation("tritonattn")
    monkeypatch.setattr(type(network), "_supports_sdpa", False)
    monkeypatch.setattr(first_use, "_waiting", [follow_saved_settings])
    masks: list[object] = []
    network.model.layers[0].register_forward_pre_hook(
        lambda layer, inputs, named: masks.append(named["attention_mask"]), with_kwargs=True
    )
    LLAMA.build()
    network(torch.arange(5)[None])
    assert isinstance(masks[0], torch.Tensor)
