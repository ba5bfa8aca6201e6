"""An import changes no class of transformers; the first model that is built, patched or unpickled does."""

import json
import pickle
import subprocess
import sys

import pytest
import torch

from tests.huggingface.test_patch import LLAMA
from tritonattn.huggingface import first_use, patch
from tritonattn.huggingface.loading import follow_saved_settings

# In a process of its own; the argument is a folder with a saved patched model.
PROGRAM = """
import json, sys
from transformers import AutoModelForCausalLM, PreTrainedModel, LlamaForCausalLM
from transformers.generation.continuous_batching import ContinuousBatchingManager

CLASSES = *LlamaForCausalLM.__mro__, ContinuousBatchingManager
before = {one: dict(vars(one)) for one in CLASSES}
import tritonattn.huggingface
after = {one: dict(vars(one)) for one in CLASSES}
pairs = [(one, name) for one in CLASSES for name in {*before[one], *after[one]}]
names = [name for one, name in pairs if before[one].get(name) is not after[one].get(name)]
model = AutoModelForCausalLM.from_pretrained(sys.argv[1])
layers = tritonattn.huggingface.patched(model).layers.values()
print(json.dumps([names, [own.scaling.name for own in layers]]))
"""


def test_an_import_changes_no_class_and_a_saved_patch_loads_after_it(tmp_path):
    network = LLAMA.build()
    patch(network, scaling="key_norm_mean")
    network.save_pretrained(tmp_path)
    command = [sys.executable, "-W", "ignore", "-c", PROGRAM, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == [[], ["key_norm_mean"] * 2]


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
