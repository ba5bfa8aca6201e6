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

# In another process; the argument is a folder with a saved patched model.
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
print(json.dumps([names, [layer.scaling.name for layer in layers], refuses]))
"""


@pytest.mark.slow
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
def waiting(monkeypatch) -> list:
    """The calls that wait for the first use: none."""
    monkeypatch.setattr(first_use, "_waiting", [])
    return first_use._waiting


USES = {
    "built": lambda network: LLAMA.build(),
    "wrapped": nn.Sequential,
    "patched": lambda network: patch(network, scaling="key_count"),
    "unpickled": lambda network: pickle.loads(pickle.dumps(network)),
}


@pytest.mark.parametrize("use", USES)
def test_the_first_use_of_a_model(use, waiting):
    network, uses = LLAMA.build(), []
    if use == "unpickled":
        patch(network, scaling="key_count")
    waiting.append(lambda: uses.append(use))
    for _ in range(1 if use == "patched" else 2):
        USES[use](network)
    assert uses == [use]


def test_a_model_that_lives_at_the_import_is_refused_early(waiting, monkeypatch):
    monkeypatch.setattr(first_use, "register_module_module_registration_hook", lambda hook: None)
    config = transformers.BloomConfig(hidden_size=8, n_layer=1, n_head=2, vocab_size=9)
    with without_tritonattn():
        network = transformers.BloomForCausalLM(config)
        register()
        first_use.at_first_use(follow_saved_settings)
        with pytest.raises(NotImplementedError, match="BloomAttention"):
            network.set_attn_implementation("tritonattn")


@pytest.mark.parametrize("supports_sdpa", [True, False])
def test_masks_of_a_model_that_was_built_before_are_explicit(supports_sdpa, waiting, monkeypatch):
    """Its class may lack the flags by which layers do without masks; without SDPA they may be wrong, and masks stay."""
    network, tokens, masks = LLAMA.build(), torch.arange(5)[None], []
    network.set_attn_implementation("tritonattn")
    monkeypatch.setattr(type(network), "_supports_sdpa", supports_sdpa)
    network.model.layers[0].register_forward_pre_hook(
        lambda layer, inputs, named: masks.append(named["attention_mask"]), with_kwargs=True
    )
    waiting.append(follow_saved_settings)
    before = network(tokens).logits
    LLAMA.build()  # the first use
    torch.testing.assert_close(network(tokens).logits, before)
    assert [mask is None for mask in masks] == [False, supports_sdpa]
